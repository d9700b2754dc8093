"""Configuration values that make each family of transformers tiny, with what it is known for still in it."""

from __future__ import annotations

from typing import Any

from tests.tuna_kernels.integrations.tiny_models import VOCABULARY, WINDOW

_NO_DROPOUT = (
    *(
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "activation_dropout",
    ),
    *("attention_probs_dropout_prob", "hidden_dropout_prob", "layerdrop", "decoder_layerdrop", "residual_dropout"),
)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "is_decoder": True,
    "sliding_window": WINDOW,
    **dict.fromkeys(_NO_DROPOUT, 0.0),
}
"""What most configurations understand; the others keep it to themselves."""

_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_ONE_GROUP = {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_DECODER = {
    "num_hidden_layers": None,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "is_encoder_decoder": False,
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
_STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot-small", "marian", "mbart", "mvp", "pegasus"), _DECODER),
    **dict.fromkeys(("plbart", "trocr", "whisper"), _DECODER),
    **dict.fromkeys(("dots1", "glm4_moe"), _ONE_GROUP),
    **dict.fromkeys(("kimi_linear", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLUTION),
    "bamba": {**_STATE, "attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {**_STATE, "mamba_d_ssm": 64},
    "gemma3": {
        "text_config": SMALL,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "num_layers": 2,
        "num_heads": 4,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "window_size": 64,
    },
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 3.0},
    **{name: {"logits_scaling": 3.0} for name in ("granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared")},
    "granitemoehybrid": {
        **_STATE,
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 16,
        "logits_scaling": 3.0,
    },
    "hyperclovax": {"logits_scaling": 0.3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 64,
        "floor_scale": 4,
        "no_rope_layers": [1, 0],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "nemotron": {"num_key_value_heads": 4},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "stablelm": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

UNTRIED: dict[str, tuple[str, ...]] = {
    "image, audio or byte-level models around a text model listed separately, or without a tiny configuration here": (
        *("blt", "emu3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git"),
        *("got_ocr2", "llama4", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"),
        *("qwen3_5", "qwen3_5_moe", "qwen4_exp", "dots3_note"),
    ),
    "other families whose tiny configuration needs more than a few settings": (
        *("blenderbot", "cohere_compass_text", "dots3_note_text", "hy_v4", "inkling2_text", "prophetnet"),
        *("qwen4_exp_text", "reformer", "roc_bert", "xlnet", "xlstm", "zamba", "zamba2"),
    ),
}
