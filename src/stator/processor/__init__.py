"""The Processor: chat templates, tokens and text."""

from stator.processor.model_files import context_length, model_type
from stator.processor.processor import Processor, ProcessorSettings
from stator.processor.tokenizer import ModelTokenizer
from stator.processor.validation import SamplingDefaults

__all__ = ["ModelTokenizer", "Processor", "ProcessorSettings", "SamplingDefaults", "context_length", "model_type"]
