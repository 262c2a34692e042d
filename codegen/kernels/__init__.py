"""Triton kernels and their launchers, one op per file. Importing one imports Triton; nothing else does."""
