"""The exceptions of qwen_fast.

ModelError (a ValueError): a checkpoint, tokenizer or template is missing, malformed or does not fit.
EngineError (a RuntimeError): the engine is closed or failed.
Wrong arguments raise ValueError or TypeError; what is known but not built yet raises NotImplementedError.
"""

from .native import _engine

ModelError = _engine.ModelError
EngineError = _engine.EngineError

__all__ = ["EngineError", "ModelError"]
