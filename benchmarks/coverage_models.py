"""The architectures on which structured pruning is tried: torchvision, timm and transformers, random weights.

Nothing is downloaded. Each entry builds a model from a seed and an example input as small as the architecture takes.
Parameters are stirred after building: initialisers leave many of them at exactly zero (biases, last scales of
residual branches, layer scales), where a wrong cut would change nothing and go unseen.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import UnknownName
from prunus.measure.forwarding import call, evaluating
from prunus.models.vision_repair import repair_torchvision
from prunus.randomness import generator

BATCH = 2
MANY = 8
CLASSES = 11  # of the transformers; torchvision and timm keep their 1,000
VOCABULARY = 97
TOKENS = 24


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: as its library calls it.
        suite: "torchvision", "timm" or "transformers".
        make: builds the model from random weights.
        example: builds the input: a tensor, or a mapping of keyword arguments.
        note: what a reader of the table should know, such as the part of the library it comes from.
        many: builds an input of more rows, from which batch norms take their statistics; default: the example.
    """

    name: str
    suite: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    note: str = ""
    many: Callable[[], Any] | None = None

    def fresh(self, seed: int = 0) -> nn.Module:
        """Return a new model as its constructor leaves it, with random weights of `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def build(self) -> nn.Module:
        """Return a new model in the mode its constructor leaves it in, stirred and settled."""
        model = self.fresh()
        stir(model)
        settle(model, self.many() if self.many else self.example())
        return model


def stir(model: nn.Module) -> None:
    """Move every floating parameter off the values that initialisers favour, in place.

    Constant tensors and all vectors change: tiny values become normal with deviation 0.1 (0.02 in matrices), others
    are scaled by a factor uniform in [0.5, 1.5]. Random matrices stay as they are.
    """
    draws = generator(0, "benchmark", "stir")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            if parameter.ndim > 1 and not bool((parameter == parameter.flatten()[0]).all()):
                continue
            if float(parameter.abs().max()) < 0.01:
                parameter.normal_(0.0, 0.1 if parameter.ndim <= 1 else 0.02, generator=draws)
            else:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5, generator=draws))


def settle(model: nn.Module, inputs: Any) -> None:
    """Give batch norms the statistics of `inputs`, in place.

    With those of the constructor, a deep net in eval mode shrinks or blows up its input until outputs depend on
    biases alone, and a wrong cut in an early layer would not be seen.
    """
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    momenta = [module.momentum for module in norms]
    with evaluating(model), torch.no_grad():
        for module in norms:
            module.training, module.momentum = True, 1.0
        if norms:
            call(model, inputs)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        if isinstance(counted := getattr(module, "num_batches_tracked", None), Tensor):
            counted.zero_()
        # Of the few numbers behind them, some variances are almost zero by chance, and would blow up other inputs.
        module.running_var.clamp_(min=0.5 * float(module.running_var.median()) + 1e-6)


def images(size: int, batch: int = BATCH) -> Tensor:
    """Return normal images of shape (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=generator(0, "benchmark", "images", size))


# -- torchvision ----------------------------------------------------------------------------------------------------

# Sizes of models that do not run at 64 pixels, in train mode too, where auxiliary classifiers join.
_TORCHVISION_SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 70}


def torchvision_entries() -> list[Entry]:
    """Return one entry for each classification constructor of torchvision."""
    repair_torchvision()
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        size = _TORCHVISION_SIZES.get(name, 64)
        given = {"image_size": size} if name.startswith("vit_") else {}
        make = partial(models.get_model, name, weights=None, **given)
        found.append(Entry(name, "torchvision", make, partial(images, size), many=partial(images, size, MANY)))
    return found


# -- timm -----------------------------------------------------------------------------------------------------------

# Families whose models are built for one image size, which must then be given.
_SIZED = (
    "beit byoanet byobnet cait coat convit deepseek_vit deit efficientformer efficientformer_v2 "
    "efficientvit_msra eva gcvit gemma4_vit hiera levit maxxvit mlp_mixer mobilevit mvitv2 naflexvit nest "
    "pit qwen3_vit repvit sequencer swiftformer swin_transformer swin_transformer_v2 "
    "swin_transformer_v2_cr tnt twins visformer vision_transformer vision_transformer_hybrid "
    "vision_transformer_relpos vision_transformer_sam vitamin volo xcit"
)
# Sizes at which attention windows, patches or the last pooling still fit; 64 pixels suffice for all others.
_TIMM_SIZES = {
    "aimv2_large_patch14_224": 70,
    "bat_resnext26ts": 256,
    "deepseek_vit_412m": 70,
    "efficientformer_l1": 224,
    "eva02_tiny_patch14_224": 70,
    "halonet26t": 256,
    "haloregnetz_b": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "vit_small_patch14_reg4_dinov2": 70,
}

# The smallest of each family, and more where one family holds several designs.
_TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256 halonet26t lambda_resnet26t haloregnetz_b sebotnet33ts_256",
    "byobnet": (
        "gernet_s mobileone_s0 repvgg_a0 regnetz_b16 bat_resnext26ts gcresnext26ts eca_resnext26ts resnet32ts "
        "resnet50_clip test_byobnet"
    ),
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14",
    "convnext": "convnext_atto convnext_atto_ols convnextv2_atto convnext_tiny convnext_zepto_rms",
    "cpubone": "cpubone_nano cpubone_b0_bfrobust",
    "crossvit": "crossvit_tiny_240 crossvit_9_dagger_240",
    "csatv2": "csatv2",
    "cspnet": "cspresnet50 darknet53 cs3darknet_s cs3sedarknet_l cs3darknet_focus_s darknet17",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla34 dla46x_c dla60_res2net",
    "dpn": "dpn68 dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": (
        "efficientnet_b0 efficientnetv2_s efficientnet_lite0 mobilenetv2_050 mnasnet_small semnasnet_075 "
        "mixnet_s fbnetc_100 tinynet_e tf_efficientnet_b0 efficientnet_cc_b0_4e spnasnet_100 mobilenetv1_100 "
        "mobilenet_edgetpu_v2_xs test_efficientnet efficientnet_b0_gn"
    ),
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0 efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0",
    "eva": (
        "eva02_tiny_patch14_224 vit_small_patch16_rope_224 vit_pe_core_tiny_patch16_384 "
        "vit_tiny_patch16_dinov3_qkvb vit_small_plus_patch16_dinov3"
    ),
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8 fastvit_sa12",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnet_tiny hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t iformer_s",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_conv_128s",
    "lowformer": "lowformer_b0 lowformer_e1",
    "mambaout": "mambaout_femto",
    "maxxvit": (
        "coatnet_pico_rw_224 coatnet_nano_cc_224 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 "
        "maxxvitv2_nano_rw_256 coatnext_nano_rw_224 test_coatnet"
    ),
    "metaformer": "poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18",
    "mlp_mixer": "mixer_s32_224 gmixer_12_224 gmlp_ti16_224 resmlp_12_224",
    "mobilenetv3": (
        "mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 fbnetv3_b"
    ),
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny mvitv2_small_cls",
    "naflexvit": "naflexvit_base_patch16_gap naflexvit_base_patch16_map",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_resnet26 nfnet_l0 nf_regnet_b0 dm_nfnet_f0 test_nfnet",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0 pvt_v2_b2_li",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetz_005 regnetv_040",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m0_9",
    "res2net": "res2net50_14w_8s res2next50",
    "resnest": "resnest14d resnest50d_4s2x40d",
    "resnet": (
        "resnet10t resnet18 resnet26d resnext50_32x4d seresnet18 ecaresnet26t resnetblur18 resnetaa34d "
        "resnetrs50 resnet50_gn wide_resnet50_2"
    ),
    "resnetv2": "resnetv2_18 resnetv2_50x1_bit resnetv2_50d_gn",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42b",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d legacy_senet154",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18 skresnext50_32x4d",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small twins_svt_small",
    "vgg": "vgg11 vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": (
        "vit_tiny_patch16_224 vit_small_patch32_224 vit_small_patch14_reg4_dinov2 "
        "vit_wee_patch16_reg1_gap_256 vit_base_patch32_clip_224 vit_base_patch16_siglip_224 "
        "vit_small_patch16_18x2_224 flexivit_small test_vit test_vit3 vit_dwee_patch16_reg1_gap_256 "
        "aimv2_large_patch14_224 beit3_base_patch16_224"
    ),
    "vision_transformer_hybrid": (
        "vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 vit_small_resnet26d_224 vit_base_mci_224"
    ),
    "vision_transformer_relpos": (
        "vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_relpos_medium_patch16_cls_224"
    ),
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "vovnet39a ese_vovnet19b_slim_dw eca_vovnet39b",
    "xception": "legacy_xception",
    "xception_aligned": "xception41 xception41p",
    "xcit": "xcit_nano_12_p16_224",
}

# Families of which no model runs small enough, and why.
LEFT_OUT: dict[str, str] = {}


def timm_entries() -> list[Entry]:
    """Return the chosen models of every timm family."""
    repair_torchvision()
    found = []
    for family, names in _TIMM.items():
        for name in names.split():
            size = _TIMM_SIZES.get(name, 64)
            sized = {"img_size": size} if family in _SIZED.split() else {}
            make, one, many = partial(_from_timm, name, sized), partial(images, size), partial(images, size, MANY)
            found.append(Entry(name, "timm", make, one, family, many))
    return found


def _from_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


# -- transformers ---------------------------------------------------------------------------------------------------


def tokens(length: int = TOKENS) -> Tensor:
    """Return token numbers of shape (2, length), none of them a special one."""
    return torch.randint(5, VOCABULARY, (BATCH, length), generator=generator(0, "benchmark", "tokens"))


def text() -> dict[str, Tensor]:
    """Return the input of an encoder or decoder."""
    return {"input_ids": tokens()}


def two_texts() -> dict[str, Tensor]:
    """Return the input of an encoder-decoder."""
    return {"input_ids": tokens(), "decoder_input_ids": tokens(10)}


def pixels(size: int) -> dict[str, Tensor]:
    """Return the input of a vision model."""
    return {"pixel_values": images(size)}


def wave(length: int = 4000) -> dict[str, Tensor]:
    """Return the input of a model that hears raw sound."""
    return {"input_values": torch.randn(BATCH, length, generator=generator(0, "benchmark", "wave"))}


def spectrum(channels: int, frames: int, *, with_text: bool) -> dict[str, Tensor]:
    """Return the input of a model that hears spectrograms (batch, channels, frames), and starts a text."""
    sound = torch.randn(BATCH, channels, frames, generator=generator(0, "benchmark", "spectrum"))
    return {"input_features": sound} | ({"decoder_input_ids": tokens(10)} if with_text else {})


def frames_first() -> dict[str, Tensor]:
    """Return the input of the audio spectrogram transformer: (batch, frames, channels)."""
    return {"input_values": torch.randn(BATCH, 64, 32, generator=generator(0, "benchmark", "frames"))}


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _DECODER | {"num_key_value_heads": 4, "head_dim": 8}
_EXPERTS = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_labels": CLASSES,
}
_STAGES = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": CLASSES,
}
_SPEECH = {
    "vocab_size": 29,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "num_labels": CLASSES,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}
_WHISPER = _BART | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "num_labels": CLASSES}

_Row = tuple[str, str, dict[str, Any], Callable[[], Any]]  # model class, configuration class, its arguments, input

_TRANSFORMERS: dict[str, list[_Row]] = {
    "encoder": [
        ("BertForSequenceClassification", "BertConfig", _ENCODER, text),
        ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, text),
        (
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {
                "vocab_size": VOCABULARY,
                "dim": 64,
                "n_layers": 2,
                "n_heads": 4,
                "hidden_dim": 128,
                "max_position_embeddings": 64,
                "num_labels": CLASSES,
            },
            text,
        ),
        ("AlbertForSequenceClassification", "AlbertConfig", _ENCODER | {"embedding_size": 32}, text),
        (
            "DebertaForSequenceClassification",
            "DebertaConfig",
            _ENCODER | {"pos_att_type": ["c2p", "p2c"], "relative_attention": True},
            text,
        ),
        (
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            _ENCODER
            | {
                "relative_attention": True,
                "position_buckets": 8,
                "pos_att_type": ["p2c", "c2p"],
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
                "max_relative_positions": -1,
                "position_biased_input": False,
            },
            text,
        ),
        ("ElectraForSequenceClassification", "ElectraConfig", _ENCODER | {"embedding_size": 32}, text),
        ("MPNetForSequenceClassification", "MPNetConfig", _ENCODER, text),
        (
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            _ENCODER | {"pad_token_id": 0, "local_attention": 8},
            text,
        ),
        ("SqueezeBertForSequenceClassification", "SqueezeBertConfig", _ENCODER | {"embedding_size": 64}, text),
        (
            "MobileBertForSequenceClassification",
            "MobileBertConfig",
            _ENCODER | {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2},
            text,
        ),
        (
            "FNetForSequenceClassification",
            "FNetConfig",
            {k: v for k, v in _ENCODER.items() if k != "num_attention_heads"},
            text,
        ),
        ("RoFormerForSequenceClassification", "RoFormerConfig", _ENCODER, text),
        (
            "ConvBertForSequenceClassification",
            "ConvBertConfig",
            _ENCODER | {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
            text,
        ),
    ],
    "decoder": [
        (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False},
            text,
        ),
        (
            "OPTForCausalLM",
            "OPTConfig",
            {
                **{k: v for k, v in _DECODER.items() if k != "intermediate_size"},
                "ffn_dim": 128,
                "word_embed_proj_dim": 64,
                "num_attention_heads": 4,
            },
            text,
        ),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER | {"num_attention_heads": 4}, text),
        (
            "BloomForCausalLM",
            "BloomConfig",
            {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False},
            text,
        ),
        (
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global", "local"], 1]],
                "intermediate_size": 128,
                "max_position_embeddings": 64,
                "window_size": 8,
                "use_cache": False,
            },
            text,
        ),
        (
            "GPTJForCausalLM",
            "GPTJConfig",
            {
                "vocab_size": VOCABULARY,
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "rotary_dim": 8,
                "use_cache": False,
            },
            text,
        ),
        (
            "FalconForCausalLM",
            "FalconConfig",
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "use_cache": False,
                "new_decoder_architecture": False,
                "multi_query": True,
                "parallel_attn": True,
            },
            text,
        ),
        ("PhiForCausalLM", "PhiConfig", _DECODER, text),
    ],
    "grouped query": [
        ("LlamaForCausalLM", "LlamaConfig", _GROUPED, text),
        ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 8}, text),
        ("Qwen2ForCausalLM", "Qwen2Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}, text),
        ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED, text),
        ("GemmaForCausalLM", "GemmaConfig", _GROUPED, text),
        ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}, text),
        ("Phi3ForCausalLM", "Phi3Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}, text),
        ("Olmo2ForCausalLM", "Olmo2Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}, text),
        ("Starcoder2ForCausalLM", "Starcoder2Config", {k: v for k, v in _GROUPED.items() if k != "head_dim"}, text),
    ],
    "mixture of experts": [
        ("MixtralForCausalLM", "MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, text),
        (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {k: v for k, v in _EXPERTS.items() if k != "head_dim"} | {"shared_expert_intermediate_size": 64},
            text,
        ),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS, text),
        (
            "OlmoeForCausalLM",
            "OlmoeConfig",
            {k: v for k, v in _GROUPED.items() if k != "head_dim"} | {"num_experts": 4, "num_experts_per_tok": 2},
            text,
        ),
    ],
    "encoder-decoder": [
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "use_cache": False,
            },
            two_texts,
        ),
        ("BartForConditionalGeneration", "BartConfig", _BART, two_texts),
        ("MBartForConditionalGeneration", "MBartConfig", _BART, two_texts),
        ("PegasusForConditionalGeneration", "PegasusConfig", _BART, two_texts),
        ("MarianMTModel", "MarianConfig", _BART, two_texts),
    ],
    "vision": [
        ("ViTForImageClassification", "ViTConfig", _VISION, partial(pixels, 32)),
        ("DeiTForImageClassification", "DeiTConfig", _VISION, partial(pixels, 32)),
        ("BeitForImageClassification", "BeitConfig", _VISION, partial(pixels, 32)),
        ("Dinov2ForImageClassification", "Dinov2Config", _VISION | {"mlp_ratio": 2}, partial(pixels, 32)),
        ("SwinForImageClassification", "SwinConfig", _STAGES, partial(pixels, 32)),
        ("Swinv2ForImageClassification", "Swinv2Config", _STAGES, partial(pixels, 32)),
        (
            "ConvNextForImageClassification",
            "ConvNextConfig",
            {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 4, 2], "num_labels": CLASSES},
            partial(pixels, 64),
        ),
        (
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 4, 2], "num_labels": CLASSES},
            partial(pixels, 64),
        ),
        (
            "ResNetForImageClassification",
            "ResNetConfig",
            {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 1, 2, 1], "num_labels": CLASSES},
            partial(pixels, 64),
        ),
        (
            "SegformerForImageClassification",
            "SegformerConfig",
            {
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [16, 32, 64, 128],
                "num_attention_heads": [1, 2, 4, 8],
                "num_labels": CLASSES,
            },
            partial(pixels, 64),
        ),
    ],
    "audio": [
        ("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, wave),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _SPEECH, wave),
        ("HubertForSequenceClassification", "HubertConfig", _SPEECH, wave),
        ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, partial(spectrum, 16, 64, with_text=True)),
        ("WhisperForAudioClassification", "WhisperConfig", _WHISPER, partial(spectrum, 16, 64, with_text=False)),
        (
            "ASTForAudioClassification",
            "ASTConfig",
            {k: v for k, v in _VISION.items() if k not in ("image_size", "patch_size")}
            | {"patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 64, "num_mel_bins": 32},
            frames_first,
        ),
    ],
}


def transformers_entries() -> list[Entry]:
    """Return the tiny configurations of transformers; caches are off, since their shapes follow the heads."""
    return [
        Entry(model, "transformers", partial(_from_configuration, model, configuration, arguments), example, kind)
        for kind, rows in _TRANSFORMERS.items()
        for model, configuration, arguments, example in rows
    ]


def _from_configuration(model: str, configuration: str, arguments: dict[str, Any]) -> nn.Module:
    repair_torchvision()
    import transformers

    # A copy: configurations keep the lists they are given and some change them.
    given = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return getattr(transformers, model)(getattr(transformers, configuration)(**given))


# -- choosing -------------------------------------------------------------------------------------------------------

SUITES: dict[str, Callable[[], list[Entry]]] = {
    "torchvision": torchvision_entries,
    "timm": timm_entries,
    "transformers": transformers_entries,
}

# Small, fast, and of as many kinds as fit into a few minutes.
QUICK = {
    "torchvision": [
        "alexnet",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnet18",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
    ],
    "timm": [
        "convnext_atto",
        "ghostnet_050",
        "mixer_s32_224",
        "res2net50_14w_8s",
        "resnest14d",
        "test_vit",
        "visformer_tiny",
        "xcit_nano_12_p16_224",
    ],
    "transformers": [
        "BertForSequenceClassification",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "T5ForConditionalGeneration",
        "SwinForImageClassification",
        "Wav2Vec2ForCTC",
    ],
}


def entries(suites: Sequence[str] = (), only: str = "*", *, quick: bool = False) -> list[Entry]:
    """Return the entries of `suites` (all when empty) whose name fits the shell pattern `only`.

    Suites whose library is not installed are left out.

    Raises:
        UnknownName: a suite that is not one of `SUITES`.
    """
    for suite in suites:
        if suite not in SUITES:
            raise UnknownName(f"suite {suite!r} is not one of {', '.join(SUITES)}.")
    chosen = [suite for suite in SUITES if (suite in suites or not suites) and importlib.util.find_spec(suite)]
    found = [entry for suite in chosen for entry in SUITES[suite]()]
    return [e for e in found if fnmatch.fnmatch(e.name, only) and (not quick or e.name in QUICK[e.suite])]
