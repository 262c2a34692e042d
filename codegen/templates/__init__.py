"""Inductor templates, one per file, and the lowering that offers them."""
