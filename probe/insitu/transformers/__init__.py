"""Row maps of Hugging Face transformers: whose rows a forward of `generate`, or of continuous batching, computes.

`insitu.attach` follows a model that can generate by itself; nothing here is on the way of a tap.
"""
