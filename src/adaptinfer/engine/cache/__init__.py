"""Cache layers that hold the surviving tokens, and what the engine reads from them."""
