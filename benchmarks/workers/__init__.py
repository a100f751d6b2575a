"""Scripts for interpreters that have another engine installed, and nothing of this project."""
