"""The passes: an FX graph in, an FX graph out, on the CPU and without Triton.

They work on the graph that Dynamo hands to a backend: one ``torch._C._nn.linear`` node per Linear, batch and token
dimensions intact, weights as placeholders with the real Parameters at hand. (ATen has flattened all that away.)
Graphs from ``symbolic_trace`` and ``torch.export`` are brought into the same form first (``functional_form``).

The order is ``detect`` -> ``annotate`` -> ``insert``; only ``insert`` edits. Facts are hung on ``node.meta``:

==================  ==============================  =======================================
key                 value                           written by
==================  ==============================  =======================================
freeact_linear      ``node_facts.LinearFact``       detect; annotate fills in the types
freeact_tokens      ``node_facts.TokenFact``/Lost   annotate
==================  ==============================  =======================================
"""

if __name__ != "freeact_fx.passes":
    raise ImportError("import freeact_fx.passes, not passes: a second copy would disagree with it")
