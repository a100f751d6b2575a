"""The record of a run: recorders, the run, its file, tables and exports, summaries."""

from xlora_core.recording.buckets import BUCKET_COLUMNS, BucketBy
from xlora_core.recording.export import ExportBy, defuse, undefuse
from xlora_core.recording.header import FORMAT_VERSION, RunHeader
from xlora_core.recording.long_table import LONG_COLUMNS
from xlora_core.recording.recorder import RunRecorder, TrackRecorder, bytes_per_token
from xlora_core.recording.run import Run
from xlora_core.recording.track import FinishReason, Track

__all__ = [
    "BUCKET_COLUMNS",
    "FORMAT_VERSION",
    "LONG_COLUMNS",
    "BucketBy",
    "ExportBy",
    "FinishReason",
    "Run",
    "RunHeader",
    "RunRecorder",
    "Track",
    "TrackRecorder",
    "bytes_per_token",
    "defuse",
    "undefuse",
]
