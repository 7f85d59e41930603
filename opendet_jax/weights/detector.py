"""The authors' detector, aligners and distiller → our tree: neck, encoder, query selection, decoder and what reads it.

A checkpoint repeats shared tensors under several names (every layer lists its heads; the decoder lists its layers up
to three times): all names of one tensor go to one path. It also holds modules that no output depends on: path None.
"""

from opendet_jax.weights.layers import convolution, deformable_attention, dense, norm, self_attention
from opendet_jax.weights.rules import Rule, linear

TRANSFORMER = r"detr\.detr\.transformer"
# A layer's heads are registered with the detector and once more with its decoder.
BOX_HEAD = r"detr\.detr\.(?:transformer\.decoder\.)?bbox_embed1"
ALIGNER = r"detr\.detr\.(?:transformer\.decoder\.)?class_embed1"


def _decoder_layer(source: str, path: str) -> tuple[Rule, ...]:
    """One-to-many layers have cross_attn, norm1, ffn, norm3; one-to-one layers all of these."""
    return (
        *deformable_attention(rf"{source}\.cross_attn", f"{path}/cross_attn"),
        *self_attention(rf"{source}\.self_attn", f"{path}/self_attn"),
        *self_attention(rf"{source}\.self_attn3", f"{path}/self_attn3"),
        *dense(rf"{source}\.linear1", f"{path}/ffn/linear1"),
        *dense(rf"{source}\.linear2", f"{path}/ffn/linear2"),
        *dense(rf"{source}\.linear31", f"{path}/ffn3/linear1"),
        *dense(rf"{source}\.linear32", f"{path}/ffn3/linear2"),
        *(
            rule
            for n in ("norm1", "norm2", "norm3", "norm33", "norm5")
            for rule in norm(rf"{source}\.{n}", f"{path}/{n}")
        ),
    )


def _distiller_block(source: str, path: str) -> tuple[Rule, ...]:
    return (
        *deformable_attention(rf"{source}\.cross_attn", f"{path}/cross_attn"),
        *norm(rf"{source}\.norm_ca", f"{path}/norm_ca"),
        *dense(rf"{source}\.linear1", f"{path}/ffn/linear1"),
        *dense(rf"{source}\.linear2", f"{path}/ffn/linear2"),
        *norm(rf"{source}\.norm3", f"{path}/norm3"),
    )


def _gated_projection(source: str, path: str) -> tuple[Rule, ...]:
    """φ: an MLP, and a gated skip without biases."""
    return (
        *dense(rf"{source}\.layers\.(\d)", rf"{path}/layers_\1"),
        Rule(rf"{source}\.linear\.weight", f"{path}/linear/kernel", linear),
        Rule(rf"{source}\.linear_gating\.weight", f"{path}/linear_gating/kernel", linear),
    )


def _aligner(source: str, path: str) -> tuple[Rule, ...]:
    return (
        *dense(rf"{source}\.dot_product_projection_image", f"{path}/v_to_l"),
        *dense(rf"{source}\.img_256", f"{path}/query"),
        *dense(rf"{source}\.text_embedding_low", f"{path}/l_to_v"),
    )


NECK_RULES = (
    *convolution(r"detr\.detr\.input_proj\.(\d)\.0", r"neck/projections_\1"),
    *norm(r"detr\.detr\.input_proj\.(\d)\.1", r"neck/norms_\1"),
    Rule(rf"{TRANSFORMER}\.level_embed", "neck/level_embed"),
)

ENCODER_RULES = (
    *deformable_attention(rf"{TRANSFORMER}\.encoder\.layers\.(\d+)\.self_attn", r"encoder/layers_\1/self_attn"),
    *norm(rf"{TRANSFORMER}\.encoder\.layers\.(\d+)\.norm([12])", r"encoder/layers_\1/norm\2"),
    *dense(rf"{TRANSFORMER}\.encoder\.layers\.(\d+)\.linear([12])", r"encoder/layers_\1/ffn/linear\2"),
)

SELECTION_RULES = (
    *dense(rf"{TRANSFORMER}\.enc_output", "query_selection/enc_output"),
    *norm(rf"{TRANSFORMER}\.enc_output_norm", "query_selection/enc_output_norm"),
    *dense(rf"{TRANSFORMER}\.enc_out_class_embed1\.body_one2many", "query_selection/score"),
    *dense(rf"{TRANSFORMER}\.enc_out_bbox_embed1\.layers\.(\d)", r"query_selection/box_head/layers_\1"),
)

DECODER_RULES = (
    *_decoder_layer(rf"{TRANSFORMER}\.decoder\.layers(?:_12many)?\.(\d+)", r"decoder/layers_\1"),
    *_decoder_layer(rf"{TRANSFORMER}\.decoder\.layers_one2one\.0", "decoder/layers_4"),
    *_decoder_layer(rf"{TRANSFORMER}\.decoder\.layers_one2one\.1", "decoder/layers_5"),
    *norm(rf"{TRANSFORMER}\.decoder\.norm", "decoder/norm"),
    *dense(rf"{BOX_HEAD}\.[0-3]\.layers\.(\d)", r"decoder/box_head_one_to_many/layers_\1"),
    *dense(rf"{BOX_HEAD}\.[45]\.layers\.(\d)", r"decoder/box_head_one_to_one/layers_\1"),
    *dense(r"detr\.detr\.class_embed_for_test\.body_one2many", "decoder/binary_head_one_to_many"),
    *dense(r"detr\.detr\.class_embed_for_test\.body_one2one", "decoder/binary_head_one_to_one"),
    Rule(r"detr\.detr\.label_enc\.weight", "denoising/label_embedding/embedding"),
)

ALIGNER_RULES = (
    *_aligner(rf"{ALIGNER}\.[0-3]", "aligner_one_to_many"),
    *_aligner(rf"{ALIGNER}\.[45]", "aligner_one_to_one"),
    *_aligner(rf"{TRANSFORMER}\.enc_vl_alignment", "aligner_encoder"),
    *_distiller_block(rf"{ALIGNER}\.[45]\.dec_gen_align", "aligner_one_to_one/refine"),
)

DISTILLER_RULES = (
    *_distiller_block(r"detr\.decoder_generate_process_back\.(\d)", r"distiller/backbone_blocks_\1"),
    *_distiller_block(r"detr\.decoder_generate_process_enc\.(\d)", r"distiller/encoder_blocks_\1"),
    # The program keeps the distiller's three projections inside the last layers' aligner.
    *_gated_projection(rf"{ALIGNER}\.[45]\.fusion", "distiller/phi"),
    *_gated_projection(rf"{ALIGNER}\.[45]\.fusion_back", "distiller/phi_backbone"),
    *_gated_projection(rf"{ALIGNER}\.[45]\.fusion_enc", "distiller/phi_encoder"),
    Rule(r"detr\.query_vis_fusion\.weight", "distiller/fusion/kernel", linear),
)

_ANY_ALIGNER = rf"(?:{ALIGNER}\.[0-5]|{TRANSFORMER}\.enc_vl_alignment)"
DEAD_RULES = (
    # Every aligner is registered with all parts, of which the first four layers' and the encoder's use three.
    Rule(
        rf"(?:{ALIGNER}\.[0-3]|{TRANSFORMER}\.enc_vl_alignment)\.(?:dec_gen_align|fusion|fusion_back|fusion_enc)\..*",
        None,
    ),
    Rule(
        rf"{_ANY_ALIGNER}\.(?:back_dec|dot_product_projection_back|linear_dec|norm_dec|norm_fuse)\.(?:weight|bias)",
        None,
    ),
    Rule(rf"{_ANY_ALIGNER}\.(?:bias0|bias_lang|log_scale)", None),
    Rule(rf"{TRANSFORMER}\.backbone_out_bbox_embed1\..*", None),
    Rule(rf"{TRANSFORMER}\.enc_out_class_embed1\.body_one2one\..*", None),
    Rule(r"mapping_text\..*", None),
    Rule(r"project_tt\..*", None),
)

DETECTOR_RULES = (
    *NECK_RULES,
    *ENCODER_RULES,
    *SELECTION_RULES,
    *DECODER_RULES,
    *ALIGNER_RULES,
    *DISTILLER_RULES,
    *DEAD_RULES,
)
