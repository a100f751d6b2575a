"""The recorder of the sample runs: ``recordings.json`` + the demo model -> ``runs/``.

``python -m sample_data.record --help`` explains the command. From the bottom up:

``recordings``
    The list of what to record, read and checked.
``stage``
    Runs the model and turns the knobs at the tokens that the list names.
``spans``
    Which adapter leads in which part of a run.
``shelf``
    The folder of the runs: what is there, and whether it belongs to this model and list.
``pages``, ``command``
    README.md beside the runs, and the table of leads; the command line.
"""
