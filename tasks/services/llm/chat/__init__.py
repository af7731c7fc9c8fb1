"""One chat completion: what is sent, how it travels, what comes back."""
