"""Pictures of what the compiler did: the HTML report, and the activations that it can show."""
