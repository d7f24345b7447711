"""patchpilot inside other people's frameworks. Nothing here is imported unless they ask for it."""
