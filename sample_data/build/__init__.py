"""The corpus builder: public packages -> rows of ``domain``, ``id``, ``user``, ``assistant``.

``python -m sample_data.build --help`` explains the command, README.md beside this file the rest.
From the bottom up:

``rows``, ``choice``
    A row, and choices that depend on nothing but the words they are made from.
``sources``, ``fetching``, ``environments``
    Which packages, pinned; how they get here; where a generator runs.
``passages``, ``smiles``, ``safety``
    Long texts cut into passages; a molecule as a graph; the molecules that are left out.
``domains``
    One module a domain: a package's files -> all its rows.
``splitting``, ``writing``, ``command``
    Rows -> training and held-out files, with their licences.
"""
