"""The journal: what a client has the service do, in a file, so that its program can be started again."""
