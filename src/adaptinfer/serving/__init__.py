"""Serving pruned models to many users, or to one.

settings.py      which pruner: a folder, a file, inline JSON, a preset
vllm_plugin/     pruning inside vLLM, as a plug-in
requests.py      what a request to the small server may say
server.py        an OpenAI-compatible server on transformers alone
"""
