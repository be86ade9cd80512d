"""One frozen Hugging Face model that keeps learning tasks and answers every row with its own mixture."""

from slm_fast.answers import Prediction
from slm_fast.config import SLMConfig
from slm_fast.encoder import Encoder
from slm_fast.fast_forward import fast_forward, patch_model, unpatch_model
from slm_fast.model import SLMModel, get_slm_model
from slm_fast.pool import KnowledgePool
from slm_fast.query_layers import choose_query_layers
from slm_fast.routing import Routing

__version__ = "0.1.0"
__all__ = [
    "Encoder",
    "KnowledgePool",
    "Prediction",
    "Routing",
    "SLMConfig",
    "SLMModel",
    "choose_query_layers",
    "fast_forward",
    "get_slm_model",
    "patch_model",
    "unpatch_model",
]
