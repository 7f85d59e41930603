"""The authors' detector, aligners and distiller ↔ our tree: neck, encoder, query selection, decoder and what reads it.

A checkpoint repeats shared tensors under several names (every layer lists its heads, the detector and its decoder list
them both, the decoder lists its layers two or three times): all names of one tensor have one path. It also holds
modules that no output depends on and that never had a gradient: path None, each by its name.
"""

from collections.abc import Iterator

from opendet_jax.weights.backbone import authors_rules
from opendet_jax.weights.rules import (
    LINEAR,
    Rule,
    Rules,
    convolution,
    dead,
    deformable_attention,
    dense,
    norm,
    self_attention,
)
from opendet_jax.weights.text import t5_rules

NEVER_USED = "kept by the authors' program, which never uses it"
TRANSFORMER = "detr.detr.transformer"
DECODER = f"{TRANSFORMER}.decoder"
OWNERS = ("detr.detr", DECODER)  # of the layers' heads, listed by both
FIRST, LAST = range(4), (4, 5)  # layers that share heads: one-to-many, one-to-one


def _decoder_layer(name: str, path: str) -> Iterator[Rule]:
    """One-to-many layers have cross_attn, norm1, ffn, norm3; one-to-one layers all of these."""
    yield from deformable_attention(f"{name}.cross_attn", f"{path}/cross_attn")
    for n in ("self_attn", "self_attn3"):
        yield from self_attention(f"{name}.{n}", f"{path}/{n}")
    for theirs, ours in (("linear1", "ffn/linear1"), ("linear2", "ffn/linear2")):
        yield from dense(f"{name}.{theirs}", f"{path}/{ours}")
    for theirs, ours in (("linear31", "ffn3/linear1"), ("linear32", "ffn3/linear2")):
        yield from dense(f"{name}.{theirs}", f"{path}/{ours}")
    for n in ("norm1", "norm2", "norm3", "norm33", "norm5"):
        yield from norm(f"{name}.{n}", f"{path}/{n}")


def _distiller_block(name: str, path: str) -> Iterator[Rule]:
    yield from deformable_attention(f"{name}.cross_attn", f"{path}/cross_attn")
    yield from norm(f"{name}.norm_ca", f"{path}/norm_ca")
    for n in (1, 2):
        yield from dense(f"{name}.linear{n}", f"{path}/ffn/linear{n}")
    yield from norm(f"{name}.norm3", f"{path}/norm3")


def _gated_projection(name: str, path: str) -> Iterator[Rule]:
    """φ: an MLP, and a gated skip without biases."""
    yield from dense(f"{name}.layers.{{n}}", f"{path}/layers_{{n}}")
    yield Rule(f"{name}.linear.weight", f"{path}/linear/kernel", LINEAR)
    yield Rule(f"{name}.linear_gating.weight", f"{path}/linear_gating/kernel", LINEAR)


def _aligner(name: str, path: str) -> Iterator[Rule]:
    yield from dense(f"{name}.dot_product_projection_image", f"{path}/v_to_l")
    yield from dense(f"{name}.img_256", f"{path}/query")
    yield from dense(f"{name}.text_embedding_low", f"{path}/l_to_v")


def _neck() -> Iterator[Rule]:
    yield from convolution("detr.detr.input_proj.{n}.0", "neck/projections_{n}")
    yield from norm("detr.detr.input_proj.{n}.1", "neck/norms_{n}")
    yield Rule(f"{TRANSFORMER}.level_embed", "neck/level_embed")


def _encoder() -> Iterator[Rule]:
    name, path = f"{TRANSFORMER}.encoder.layers.{{i}}", "encoder/layers_{i}"
    yield from deformable_attention(f"{name}.self_attn", f"{path}/self_attn")
    for n in (1, 2):
        yield from norm(f"{name}.norm{n}", f"{path}/norm{n}")
        yield from dense(f"{name}.linear{n}", f"{path}/ffn/linear{n}")


def _query_selection() -> Iterator[Rule]:
    yield from dense(f"{TRANSFORMER}.enc_output", "query_selection/enc_output")
    yield from norm(f"{TRANSFORMER}.enc_output_norm", "query_selection/enc_output_norm")
    yield from dense(f"{TRANSFORMER}.enc_out_class_embed1.body_one2many", "query_selection/score")
    yield from dense(f"{TRANSFORMER}.enc_out_bbox_embed1.layers.{{n}}", "query_selection/box_head/layers_{n}")


def _decoder() -> Iterator[Rule]:
    yield from _decoder_layer(f"{DECODER}.layers.{{i}}", "decoder/layers_{i}")
    yield from _decoder_layer(f"{DECODER}.layers_12many.{{i}}", "decoder/layers_{i}")
    for number, layer in enumerate(LAST):
        yield from _decoder_layer(f"{DECODER}.layers_one2one.{number}", f"decoder/layers_{layer}")
    yield from norm(f"{DECODER}.norm", "decoder/norm")
    for head, layers in (("one_to_many", FIRST), ("one_to_one", LAST)):
        for owner in OWNERS:
            for layer in layers:
                name = f"{owner}.bbox_embed1.{layer}.layers.{{n}}"
                yield from dense(name, f"decoder/box_head_{head}/layers_{{n}}")
    yield from dense("detr.detr.class_embed_for_test.body_one2many", "decoder/binary_head_one_to_many")
    yield from dense("detr.detr.class_embed_for_test.body_one2one", "decoder/binary_head_one_to_one")
    yield Rule("detr.detr.label_enc.weight", "denoising/label_embedding/embedding")


def _aligners_and_distiller() -> Iterator[Rule]:
    for owner in OWNERS:
        for layer in FIRST:
            yield from _aligner(f"{owner}.class_embed1.{layer}", "aligner_one_to_many")
        for layer in LAST:
            name = f"{owner}.class_embed1.{layer}"
            yield from _aligner(name, "aligner_one_to_one")
            yield from _distiller_block(f"{name}.dec_gen_align", "aligner_one_to_one/refine")
            # The program keeps the distiller's three projections inside the last layers' aligner.
            yield from _gated_projection(f"{name}.fusion", "distiller/phi")
            yield from _gated_projection(f"{name}.fusion_back", "distiller/phi_backbone")
            yield from _gated_projection(f"{name}.fusion_enc", "distiller/phi_encoder")
    yield from _aligner(f"{TRANSFORMER}.enc_vl_alignment", "aligner_encoder")
    yield from _distiller_block("detr.decoder_generate_process_back.{n}", "distiller/backbone_blocks_{n}")
    yield from _distiller_block("detr.decoder_generate_process_enc.{n}", "distiller/encoder_blocks_{n}")
    yield Rule("detr.query_vis_fusion.weight", "distiller/fusion/kernel", LINEAR)


def _dead() -> Iterator[Rule]:
    """Every aligner is registered with all parts; the first four layers' and the encoder's use three of them."""
    encoder = f"{TRANSFORMER}.enc_vl_alignment"
    plain = [f"{owner}.class_embed1.{layer}" for owner in OWNERS for layer in FIRST] + [encoder]
    refining = [f"{owner}.class_embed1.{layer}" for owner in OWNERS for layer in LAST]
    rules: list[Rule] = []
    for name in plain:
        rules += _distiller_block(f"{name}.dec_gen_align", "")
        for part in ("fusion", "fusion_back", "fusion_enc"):
            rules += _gated_projection(f"{name}.{part}", "")
    for name in (*plain, *refining):
        for part in ("back_dec", "dot_product_projection_back", "linear_dec", "norm_dec", "norm_fuse"):
            rules += dense(f"{name}.{part}", "")
        rules += [Rule(f"{name}.{part}", None) for part in ("bias0", "bias_lang", "log_scale")]
    rules += dense(f"{TRANSFORMER}.backbone_out_bbox_embed1.layers.{{n}}", "")
    rules += dense(f"{TRANSFORMER}.enc_out_class_embed1.body_one2one", "")
    rules += dense("mapping_text.layers.{n}", "")
    rules += dense("project_tt", "")
    yield from dead(NEVER_USED, (rule.name for rule in rules))


DETECTOR_RULES = (
    *_neck(),
    *_encoder(),
    *_query_selection(),
    *_decoder(),
    *_aligners_and_distiller(),
    *_dead(),
)

GENERATOR = "detr.detr.class_generate"
CLIP = "clip_model"


def _dead_generator() -> Iterator[Rule]:
    """Left over in the program: no output depends on them."""
    rules = (
        *dense(f"{GENERATOR}.t5_model.feed_hide_state.linear1", ""),
        *dense(f"{GENERATOR}.t5_model.feed_hide_state.linear2", ""),
        *dense(f"{GENERATOR}.t5_proj", ""),
        Rule(f"{GENERATOR}.t5_model.temp", None),
    )
    yield from dead(NEVER_USED, (rule.name for rule in rules))


def _clip() -> Iterator[str]:
    """The frozen text encoder with its image tower, kept in the same file in OpenAI's layout: no part of the model."""
    for tower in (f"{CLIP}.transformer", f"{CLIP}.visual.transformer"):
        block = f"{tower}.resblocks.{{i}}"
        for name in ("attn.in_proj_weight", "attn.in_proj_bias"):
            yield f"{block}.{name}"
        for name in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            yield f"{block}.{name}.weight"
            yield f"{block}.{name}.bias"
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        yield f"{CLIP}.{name}.weight"
        yield f"{CLIP}.{name}.bias"
    for name in ("token_embedding.weight", "positional_embedding", "text_projection", "logit_scale"):
        yield f"{CLIP}.{name}"
    for name in ("conv1.weight", "class_embedding", "positional_embedding", "proj"):
        yield f"{CLIP}.visual.{name}"


OPENDET_RULES = Rules(
    (
        *authors_rules("detr.detr.backbone.0.", "backbone/"),
        *DETECTOR_RULES,
        *t5_rules(f"{GENERATOR}.t5_model.", "name_generator/t5/", ("shared", "decoder.embed_tokens")),
        *_dead_generator(),
        *dead("CLIP, which is converted from its own file", _clip()),
    )
)
