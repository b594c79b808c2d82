"""The vision side: what the tower computes while it encodes, tied to the tokens of a prompt."""
