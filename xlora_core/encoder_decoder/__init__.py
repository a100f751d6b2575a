"""Encoder-decoder models (T5, BART, ...): every module follows the tokens that it reads.

The encoder's modules follow the source's tokens, the decoder's the target's; those of the decoder
that read the encoder's output (keys and values of cross-attention) follow the source's.
"""

from xlora_core.encoder_decoder.base import check_base
from xlora_core.encoder_decoder.output import XLoraEncoderOutput
from xlora_core.encoder_decoder.passes import XLoraEncoderDecoder

__all__ = ["XLoraEncoderDecoder", "XLoraEncoderOutput", "check_base"]
