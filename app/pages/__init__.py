"""One module per page; each reads like a script: widgets, engine client, frames, component."""
