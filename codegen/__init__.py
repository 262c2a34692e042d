"""From freeact op to machine code: what Inductor makes of our ops."""

if __name__ != "freeact_fx.codegen":
    raise ImportError("import freeact_fx.codegen, not codegen: it would register the ops twice")
