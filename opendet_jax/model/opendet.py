"""Open-Det, figure 2 of the paper as code: image → detector → (training: aligner) → distiller → name generator.

    backbone → neck ─→ encoder ─→ query selection → decoder ─→ aligner            query–text scores (training, `agree`)
               B_feat   E_feat     Eq. 1             │  ↑      Eq. 2
                 │        │        denoising ────────┼──┘                         (training)
                 └────────┴──────────────────→ distiller → VL-prompts → name generator → names

Every stage is a module that takes and returns a small dataclass, defined beside it; their annotated fields say what
flows. Letters are those of docs/method.md#letters.

Method: docs/method.md.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from opendet_jax.batch import Images, Objects
from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.model.aligner import Aligner
from opendet_jax.model.beam_search import Trie
from opendet_jax.model.decoder import Decoded, Decoder, one_to_many_layers
from opendet_jax.model.denoising import (
    Denoising,
    DenoisingQueries,
    DenoisingRandoms,
    attention_mask,
    denoising_slots,
    draw_randoms,
)
from opendet_jax.model.distiller import DirectPrompts, Distiller, Prompts
from opendet_jax.model.encoder import Encoder, Memory
from opendet_jax.model.layers import remat_policy
from opendet_jax.model.name_generator import NameGenerator, Names
from opendet_jax.model.neck import Features, Neck
from opendet_jax.model.query_selection import Queries, QuerySelection
from opendet_jax.model.swin import Swin

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, of ImageNet
PIXEL_STD = (58.395, 57.12, 57.375)


@struct.dataclass
class Detected:
    """On the device, what inference needs: boxes, scores and prompts of the same Q queries, of the last layer.

    `inference.Found` is what is kept of it on the host, `predict.Detections` what a user gets.
    """

    queries: Queries
    decoded: Decoded  # K = Q
    prompts: Float[Array, "B Q E"]


@struct.dataclass
class Agreement:
    """How well the last layer's queries agree with the texts of their image: Eq. 2."""

    cosine: Float[Array, "B Q G"]  # of the query, brought to E numbers, and the text: its first term, unless plain
    logits: Float[Array, "B Q G"]  # S


@struct.dataclass
class Training:
    """What the losses need. K = N + Q: the denoising queries first."""

    queries: Queries
    denoising: DenoisingQueries
    decoded: Decoded
    alignment: Float[Array, "A B K G"]  # logits S of the queries with their image's texts
    encoder_alignment: Float[Array, "B Q G"]  # the same of the selected encoder tokens
    features: Features  # with the memory, what the queries that get a prompt are distilled from
    memory: Memory


def normalise_pixels(images: Images) -> Float[Array, "B H W 3"]:
    """(x − mean) / std, and zero on the padding."""
    pixels = (jnp.asarray(images.pixels, jnp.float32) - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
    return jnp.where(jnp.asarray(images.mask)[..., None], pixels, 0.0)


class OpenDet(nn.Module):
    config: ModelConfig
    ablation: Ablation = Ablation()

    def setup(self):
        config, ablation, dtype = self.config, self.ablation, jnp.dtype(self.config.dtype)
        self.backbone = Swin(config.backbone, remat_policy(config), dtype)
        self.neck = Neck(config.width, dtype)
        self.encoder = Encoder(config)
        self.query_selection = QuerySelection(config, fixed=not ablation.object_detector)
        self.denoising = Denoising(config)
        self.decoder = Decoder(config, ablation)
        self.aligner_one_to_many, self.aligner_one_to_one, self.aligner_encoder = (
            Aligner(config, ablation.l_to_v, plain=not ablation.aligner) for _ in range(3)
        )
        self.distiller = Distiller(config) if ablation.distiller else DirectPrompts(config)
        self.name_generator = NameGenerator(config, ablation)

    def detect(self, images: Images) -> Detected:
        """Where the objects are, and a VL-prompt for each, from which `generate` makes its names."""
        return self.decode(*self.encode(images, deterministic=True))

    def decode(self, features: Features, memory: Memory, queries: Queries) -> Detected:
        """The second half of `detect`, after `encode`. Empty slots at the end of `queries` may be left out."""
        sees = jnp.broadcast_to(queries.valid[:, None], (*queries.valid.shape, queries.valid.shape[1]))
        decoded = self.decoder(queries.content, queries.boxes, memory, sees)
        prompts = self.distiller(decoded.hidden[-1], decoded.boxes[-1], features, memory, deterministic=True)
        return Detected(queries=queries, decoded=decoded, prompts=prompts.language)

    def detect_and_align(self, images: Images, texts: Float[Array, "B G E"]) -> tuple[Detected, Agreement]:
        """`detect`, and what the aligner says of the texts; to analyse a model."""
        features, memory, queries = self.encode(images, deterministic=True)
        detected = self.decode(features, memory, queries)
        return detected, self.agree(detected, memory, texts)

    def agree(self, detected: Detected, memory: Memory, texts: Float[Array, "B G E"]) -> Agreement:
        """What the aligner, which serves training, says of any texts: it can choose among given names, too."""
        hidden, boxes = detected.decoded.hidden[-1], detected.decoded.boxes[-1]
        cosine, logits = self.aligner_one_to_one.cosine_and_score(hidden, texts, memory, boxes)
        return Agreement(cosine=cosine, logits=logits)

    def __call__(self, images: Images, objects: Objects, randoms: DenoisingRandoms, deterministic: bool) -> Training:
        """The training pass up to the aligner. Random streams: "dropout", unless `deterministic`.

        The losses (losses/total.py) match queries and objects, and then call `distil` and `token_losses`: only queries
        that are matched, and denoising positives, get a prompt.
        """
        features, memory, queries = self.encode(images, deterministic)
        denoising = self.denoising(objects, randoms)
        stop = jax.lax.stop_gradient  # the decoder does not teach the encoder through its queries
        decoded = self.decoder(
            jnp.concatenate([denoising.content, stop(queries.content)], axis=1),
            jnp.concatenate([denoising.boxes, stop(queries.boxes)], axis=1),
            memory,
            attention_mask(denoising, queries.valid),
        )
        texts = jnp.asarray(objects.texts)
        real = jnp.asarray(objects.valid)[:, None]  # columns without an object score 0
        return Training(
            queries=queries,
            denoising=denoising,
            decoded=decoded,
            alignment=jnp.where(real, self.align(decoded, texts, memory, deterministic), 0.0),
            encoder_alignment=jnp.where(real, self.aligner_encoder(queries.content, texts), 0.0),
            features=features,
            memory=memory,
        )

    def encode(self, images: Images, deterministic: bool) -> tuple[Features, Memory, Queries]:
        """B_feat, E_feat, and the tokens of E_feat that look like objects."""
        maps = self.backbone(normalise_pixels(images), deterministic)
        features = self.neck(maps, jnp.asarray(images.mask))
        memory = self.encoder(features)
        return features, memory, self.query_selection(memory)

    def align(
        self, decoded: Decoded, texts: Float[Array, "B G E"], memory: Memory, deterministic: bool
    ) -> Float[Array, "A B K G"]:
        """Eq. 2 for every layer; the last two look at E_feat once more before they are compared.

        Denoising queries too: the Joint Loss needs their score.
        """
        layers = decoded.hidden.shape[0]
        one_to_many = one_to_many_layers(self.config, self.ablation)
        scores = []
        for layer in range(layers):
            hidden, boxes = decoded.hidden[layer], decoded.boxes[layer]
            aligner = self.aligner_one_to_many if layer < one_to_many else self.aligner_one_to_one
            if layer < layers - 2:
                scores.append(aligner(hidden, texts))
            else:
                scores.append(aligner(hidden, texts, memory, boxes, deterministic))
        return jnp.stack(scores)

    def distil(
        self,
        hidden: Float[Array, "B P D"],
        boxes: Float[Array, "B P 4"],
        features: Features,
        memory: Memory,
        deterministic: bool,
    ) -> Prompts:
        """VL-prompts of any P queries h_l and their boxes. Random stream: "dropout", unless `deterministic`."""
        return self.distiller(hidden, boxes, features, memory, deterministic)

    def token_losses(
        self,
        prompts: Float[Array, "R E"],
        tokens: Int[Array, "R T"],
        deterministic: bool,
        keys: Key[Array, "R"] | None = None,
    ) -> Float[Array, "R T"]:
        """Negative log-likelihood of each token of the names, given the prompts; 0 on padding.

        `keys`: each row's randomness, unless `deterministic`; None: that of the stream "dropout".
        """
        return self.name_generator.token_losses(prompts, tokens, deterministic, keys)

    def generate(
        self, prompts: Float[Array, "R E"], num_beams: int, max_new_tokens: int, trie: Trie | None = None
    ) -> Names:
        """Names of R prompts by beam search, the best first; those of `trie` alone, where there is one."""
        return self.name_generator.generate(prompts, num_beams, max_new_tokens, trie)


def init_params(model: OpenDet, key: Array, image_size: tuple[int, int] = (64, 64)) -> dict:
    """All parameters, float32, by one pass over an empty image of `image_size` (multiples of 32)."""
    images = Images(pixels=np.zeros((1, *image_size, 3), np.uint8), mask=np.ones((1, *image_size), bool))
    tokens = np.ones((1, 1, 1), np.int32)
    objects = Objects(
        boxes=np.full((1, 1, 4), 0.5, np.float32),
        valid=np.ones((1, 1), bool),
        texts=np.ones((1, 1, model.config.text_width), np.float32),
        tokens=tokens,
    )

    def everything(model: OpenDet):
        randoms = draw_randoms(key, 1, denoising_slots(model.config, 1), model.config.denoising_labels)
        training = model(images, objects, randoms, deterministic=True)
        hidden, boxes = training.decoded.hidden[-1], training.decoded.boxes[-1]
        model.distil(hidden, boxes, training.features, training.memory, deterministic=True)
        model.token_losses(jnp.asarray(objects.texts[:, 0]), jnp.asarray(tokens[:, 0]), deterministic=True)

    return jax.jit(lambda key: model.init(key, method=everything)["params"])(key)
