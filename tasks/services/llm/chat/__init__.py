"""One chat completion: request, transport, reply."""
