"""Text to batches: sources, tokenizer, packed token cache, loader."""

from kanlm.data.cache import TokenCache, token_cache, train_caches
from kanlm.data.corpus import documents, text_documents
from kanlm.data.loader import TokenLoader
from kanlm.data.tokenizer import tokenizer_for

__all__ = [
    "TokenCache",
    "TokenLoader",
    "documents",
    "text_documents",
    "token_cache",
    "tokenizer_for",
    "train_caches",
]
