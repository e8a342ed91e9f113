"""Process: stream apps that filter and enrich changes on their way to sinks."""
