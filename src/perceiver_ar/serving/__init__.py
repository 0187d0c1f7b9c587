"""A run as a server: the completions interface of OpenAI, and a page to write on.

The only part that imports web libraries (extra [serve]). One thread owns the model (engine.py); the event loop never
computes with it.
"""
