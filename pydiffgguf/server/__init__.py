"""The HTTP server behind ``pydiffgguf serve``: one model, spoken to in the ways that existing programs speak.

It calls the public Python interface only. docs/SERVER.md is its manual. It needs the extra ``pydiffgguf[server]``.
"""
