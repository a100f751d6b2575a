"""Custom views that run in the browser."""
