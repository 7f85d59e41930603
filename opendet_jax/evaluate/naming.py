"""What an evaluation needs to judge names, loaded once and before anything long begins."""

from dataclasses import dataclass

from opendet_jax.config import Config
from opendet_jax.data.records import Dataset
from opendet_jax.evaluate.name_mapping import ExactMapping, NameMapping
from opendet_jax.evaluate.name_similarity import NameTexts, name_texts
from opendet_jax.evaluate.text_encoder import RememberingEncoder, load_encoder
from opendet_jax.evaluate.text_mapping import TextEncoderMapping


@dataclass(frozen=True)
class Naming:
    mapping: NameMapping
    texts: NameTexts | None  # for the analysis of alignment, where it is asked for


def load_naming(dataset: Dataset, config: Config) -> Naming:
    """What `config.eval` asks for, on the classes and names of a data set.

    Raises:
        WeightsError: `eval.text_encoder` is needed and cannot be loaded.
        EmbeddingError: the analysis is asked for, and a true name has no embedding or one of another width than the
            model's.
    """
    needs_encoder = config.eval.name_mapping == "text_encoder" or config.eval.alignment_analysis
    encoder = load_encoder(config.eval.text_encoder) if needs_encoder and config.eval.text_encoder else None
    texts = name_texts(dataset, config, encoder) if config.eval.alignment_analysis else None
    return Naming(_mapping(dataset, config, encoder), texts)


def _mapping(dataset: Dataset, config: Config, encoder: RememberingEncoder | None) -> NameMapping:
    categories = [{"id": c.id, "name": c.name, "synonyms": c.synonyms} for c in dataset.categories]
    if config.eval.name_mapping == "exact":
        return ExactMapping(categories)
    assert encoder is not None, "Config.validate asks for eval.text_encoder"
    return TextEncoderMapping(categories, encoder)
