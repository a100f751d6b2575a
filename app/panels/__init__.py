"""Parts of a page: each draws one group of widgets and returns what the user chose."""
