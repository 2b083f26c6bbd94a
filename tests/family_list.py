"""The families of timm's architectures that are swept, in small shapes, and their models with random weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import GatedMlp, GluMlp, GroupNormAct, StdConv2d
from timm.models import byobnet, metaformer, mlp_mixer, mvitv2
from torch import Tensor, nn

CLASSES = 7


@dataclass(frozen=True)
class Family:
    """model: a name of timm's, or MODULE.CLASS of timm.models where the named ones cannot be made small."""

    name: str
    model: str
    args: dict[str, Any] = field(default_factory=dict)
    size: int = 64

    @property
    def available(self) -> bool:
        """Whether the installed timm has it."""
        if "." not in self.model:
            return bool(timm.is_model(self.model))
        module, _, name = self.model.partition(".")
        try:
            return hasattr(importlib.import_module(f"timm.models.{module}"), name)
        except ImportError:
            return False


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
MIXER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
FOUR: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
HALO = byobnet.ByoModelCfg(
    blocks=(byobnet.ByoBlockCfg("bottle", d=1, c=32, s=1), byobnet.ByoBlockCfg("self_attn", d=2, c=64, s=2)),
    stem_chs=16, self_attn_layer="halo", self_attn_kwargs={"block_size": 4, "halo_size": 2},
)  # fmt: skip
MVIT = mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16)

FAMILIES = [
    Family("ViT", "vit_tiny_patch16_224", VIT, 32),
    Family("ViT, attention pool (SigLIP)", "vit_base_patch16_siglip_224", VIT, 32),
    Family("ViT, pre-norm (CLIP)", "vit_base_patch16_clip_224", VIT, 32),
    Family("ViT, parallel blocks", "vit_base_patch16_18x2_224", VIT, 32),
    Family("ViT, relative positions", "vit_relpos_small_patch16_224", VIT, 32),
    Family("ViT, windows (SAM)", "samvit_base_patch16_224", {**VIT, "window_size": 3, "global_attn_indexes": (1,)}, 32),
    Family("ViT hybrid", "vit_tiny_r_s16_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}),
    Family("ViT, any size (NaFlex)", "naflexvit_base_patch16_gap", VIT, 32),
    Family("DINOv2, registers", "vit_small_patch14_reg4_dinov2", {**VIT, "img_size": 56, "patch_size": 14}, 56),
    Family("DINOv3", "vit_small_patch16_dinov3", VIT, 32),
    Family("DeiT, distilled", "deit_tiny_distilled_patch16_224", VIT, 32),
    Family("DeiT III", "deit3_small_patch16_224", VIT, 32),
    Family("BEiT", "beit_base_patch16_224", VIT, 32),
    Family("EVA-02", "eva02_tiny_patch14_224", {**VIT, "img_size": 56, "patch_size": 14}, 56),
    Family("EVA-02 CLIP, post-norm", "eva02_enormous_patch14_clip_224", VIT, 32),
    Family("DeepSeek ViT", "deepseek_vit_412m", {**VIT, "img_size": 42, "patch_size": 14}, 42),
    Family("Gemma 4 ViT", "gemma4_vit_167m", {**VIT, "img_size": 48, "head_dim": 16, "intermediate_size": 64}, 48),
    Family("Qwen3 ViT", "qwen3_vit_88m", {**VIT, "img_size": 64, "patch_size": 16}),
    Family("ViTamin", "vitamin_small_224", {"img_size": 64, "depth": 2}),
    Family("CaiT", "cait_xxs24_224", VIT, 32),
    Family("XCiT", "xcit_nano_12_p8_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    Family("ConViT", "convit_tiny", {**VIT, "local_up_to_layer": 1}, 32),
    Family("CrossViT", "crossvit_9_240", {"embed_dim": (16, 32), "depth": ((1, 1, 0),) * 2, "num_heads": (2, 2)}, 240),
    Family("CoaT", "coat_tiny", {
        "img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1,
    }),
    Family("CoaT-Lite", "coat_lite_tiny", {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4}),
    Family("PiT", "pit_ti_224", {"img_size": 64, "base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)}),
    Family("TNT", "tnt_s_patch16_224", {
        "img_size": 64, "embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_outer": 2,
    }),
    Family("VOLO", "volo.VOLO", {
        "img_size": 64, "layers": (1,) * 4, "embed_dims": (16, 32, 32, 32), "num_heads": (2,) * 4,
        "stem_hidden_dim": 16,
    }),
    Family("Swin", "swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4}),
    Family("Swin V2", "swinv2_tiny_window8_256", {**SWIN, "window_size": 4}),
    Family("Swin V2 (CR)", "swinv2_cr_tiny_224", SWIN),
    Family("MaxViT", "test_maxvit", {"img_size": 64}),
    Family("CoAtNet", "test_coatnet", {"img_size": 64}),
    Family("PVT v2", "pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 20, 32)}),
    Family("Twins-SVT", "twins_svt_small", {
        "img_size": 64, "embed_dims": (16, 16, 16, 32), "depths": (2,) * 4, "num_heads": (2,) * 4, "wss": (4, 4, 4, 2),
    }),
    Family("Twins-PCPVT", "twins_pcpvt_small", {
        "img_size": 64, "embed_dims": (16, 16, 16, 32), "depths": (1,) * 4, "num_heads": (1, 2, 2, 2),
    }),
    Family("NesT", "nest.Nest", {
        "img_size": 64, "embed_dims": (16, 16, 32), "num_heads": (1, 2, 2), "depths": (1, 1, 1),
    }),
    Family("GCViT", "gcvit.GlobalContextVit", {
        "img_size": 64, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2),
    }),
    Family("DaViT", "davit_tiny", {"depths": (1,) * 4, "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2)}, 128),
    Family("FocalNet", "focalnet.FocalNet", {"embed_dim": 8, "depths": (1, 1, 2, 1)}),
    Family("FocalNet, post-norm", "focalnet.FocalNet", {
        "embed_dim": 8, "depths": (1, 1, 2, 1), "use_post_norm": True, "layerscale_value": 0.5,
    }),
    Family("Hiera", "hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 8, "stages": (1, 1, 2, 1)}),
    Family("HieraDet (SAM 2)", "hieradet_small", {
        "embed_dim": 8, "stages": (1, 1, 2, 1), "global_att_blocks": (3,), "window_spec": (4, 4, 2, 2),
    }),
    Family("MViTv2", "mvitv2.MultiScaleVit", {"cfg": MVIT, "img_size": (128, 128)}, 128),
    Family("Visformer", "visformer_tiny", {
        "img_size": 64, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2,
    }),
    Family("LeViT", "levit_128s", {
        "img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1),
    }),
    Family("MobileViT", "mobilevit_xxs"),
    Family("MobileViT v2", "mobilevitv2_050"),
    Family("EdgeNeXt", "edgenext_xx_small", {"dims": (8, 16, 24, 32), "depths": (1, 2, 2, 2), "heads": (2,) * 4}, 256),
    Family("EfficientFormer", "efficientformer.EfficientFormer", {
        "depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32), "num_vit": 1,
    }, 224),
    Family("EfficientFormer V2", "efficientformerv2_s0", {
        "img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (16, 16, 32, 32),
    }),
    Family("EfficientViT (MIT)", "efficientvit_b0", {"head_widths": (64, 64)}),
    Family("EfficientViT (MSRA)", "efficientvit_m0", {
        "img_size": 128, "embed_dim": (16, 32, 48), "key_dim": (4, 4, 4), "depth": (1, 1, 1),
    }, 128),
    Family("EfficientViM", "efficientvim_m1", {"embed_dim": (16, 24, 32), "depths": (1, 1, 1)}),
    Family("FastViT", "fastvit_t8", {"embed_dims": (16, 16, 32, 32), "layers": (1,) * 4}),
    Family("FastViT, attention", "fastvit_sa12", {"embed_dims": (16, 16, 32, 32), "layers": (1,) * 4}),
    Family("TinyViT", "tiny_vit_5m_224", {
        "embed_dims": (16, 16, 32, 32), "depths": (1,) * 4, "num_heads": (1, 2, 2, 2),
    }, 128),
    Family("Next-ViT", "nextvit.NextViT", {"in_chans": 3, "depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}),
    Family("SwiftFormer", "swiftformer_xs", {"img_size": 64, "layers": (1,) * 4, "embed_dims": (16, 16, 32, 32)}),
    Family("RepViT", "repvit_m0_9", {"embed_dim": (16, 16, 32, 32), "depth": (1,) * 4}),
    Family("SHViT", "shvit_s1", {"embed_dim": (16, 32, 48), "partial_dim": (8, 8, 16)}),
    Family("iFormer", "iformer_t", {"dims": (16, 16, 32, 32), "depths": (1, 1, 9, 6)}),
    Family("Sequencer2D", "sequencer2d_s", {
        "img_size": 56, "layers": (1,) * 4, "embed_dims": (16,) * 4, "hidden_sizes": (4,) * 4,
    }, 56),
    Family("MLP-Mixer", "mlp_mixer.MlpMixer", MIXER, 32),
    Family("gMixer", "mlp_mixer.MlpMixer", {**MIXER, "mlp_ratio": (1.0, 4.0), "mlp_layer": GluMlp}, 32),
    Family("ResMLP", "mlp_mixer.MlpMixer", {
        **MIXER, "mlp_ratio": 4, "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine,
    }, 32),
    Family("gMLP", "mlp_mixer.MlpMixer", {
        **MIXER, "mlp_ratio": 6, "block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": GatedMlp,
    }, 32),
    Family("PoolFormer", "metaformer.MetaFormer", FOUR),
    Family("ConvFormer", "metaformer.MetaFormer", {**FOUR, "token_mixers": metaformer.SepConv}),
    Family("CAFormer", "metaformer.MetaFormer", {
        **FOUR, "dims": (8, 16, 32, 32), "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    }, 128),
    Family("ConvMixer", "convmixer.ConvMixer", {"dim": 32, "depth": 2, "patch_size": 8, "kernel_size": 5}),
    Family("ConvNeXt", "test_convnext", {}, 224),
    Family("ConvNeXt V2", "convnextv2_atto", FOUR),
    Family("InceptionNeXt", "inception_next_atto", {"depths": (1,) * 4, "dims": (16, 16, 32, 32)}),
    Family("MambaOut", "test_mambaout"),
    Family("StarNet", "starnet_s050"),
    Family("RDNet", "rdnet_tiny", {"growth_rates": (8,) * 7, "num_blocks_list": (2,) * 7, "num_init_features": 16}),
    Family("FasterNet", "fasternet_t0", {"embed_dim": 8, "depths": (1,) * 4, "feature_dim": 64}),
    Family("CSATv2", "csatv2", {
        "dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1),
    }, 128),
    Family("ResNet", "test_resnet"),
    Family("ResNet-D", "resnet26d", {"channels": (8, 8, 16, 16)}),
    Family("ResNeXt", "resnext26ts"),
    Family("SE-ResNet", "seresnet50", {"layers": (1,) * 4, "channels": (8, 8, 16, 16)}),
    Family("SENet (legacy)", "legacy_seresnet18"),
    Family("ECA-ResNet", "ecaresnet26t", {"channels": (8, 8, 16, 16)}),
    Family("GC-ResNeXt", "gcresnext26ts"),
    Family("ResNet, attention pool (CLIP)", "resnet50_clip", {"width_factor": 0.25}),
    Family("ResNeSt", "resnest14d"),
    Family("SK-ResNet", "skresnet18"),
    Family("Res2Net", "res2net50_14w_8s", {"layers": (1,) * 4, "channels": (8, 8, 16, 16)}),
    Family("ResNetV2", "resnetv2_50", {"layers": (1,) * 4, "channels": (32, 32, 64, 64)}),
    Family("ResNetV2, standardised (BiT)", "resnetv2.ResNetV2", {
        "layers": (1,) * 4, "channels": (16, 16, 32, 32), "stem_chs": 16, "stem_type": "fixed",
        "conv_layer": partial(StdConv2d, eps=1e-8), "norm_layer": partial(GroupNormAct, num_groups=2),
    }),
    Family("NF-ResNet, standardised", "nf_resnet26", {"width_factor": 0.25} ),
    Family("NFNet, standardised", "test_nfnet"),
    Family("RegNetX", "regnetx_002"),
    Family("RegNetY", "regnety_002"),
    Family("RegNetZ", "regnetz_005"),
    Family("EfficientNet", "test_efficientnet"),
    Family("EfficientNet (TF, padded)", "tf_efficientnet_b0"),
    Family("EfficientNet V2", "tf_efficientnetv2_b0", {}, 96),
    Family("MixNet", "mixnet_s"),
    Family("MnasNet", "mnasnet_small"),
    Family("MobileNet V1", "mobilenetv1_100"),
    Family("MobileNet V2", "mobilenetv2_035"),
    Family("MobileNet V3", "mobilenetv3_small_050"),
    Family("MobileNet V4", "mobilenetv4_conv_small_035"),
    Family("MobileNet V4, attention", "mobilenetv4_hybrid_medium_075"),
    Family("HardCoRe-NAS", "hardcorenas_a"),
    Family("LCNet", "lcnet_035"),
    Family("LCNet V2", "lcnetv2_small"),
    Family("GhostNet", "ghostnet_050"),
    Family("GhostNet V2", "ghostnetv2_100"),
    Family("GhostNet V3", "ghostnetv3_050"),
    Family("RepGhostNet", "repghostnet_050"),
    Family("ReXNet", "rexnet_100", {"width_mult": 0.3}),
    Family("LowFormer", "lowformer_b0"),
    Family("CPUBone", "cpubone_nano"),
    Family("VGG", "vgg.VGG", {"cfg": [16, "M", 16, "M", 32, "M", 32, "M", 32, "M"], "mlp_ratio": 0.1}),
    Family("Inception v3", "inception_v3", {}, 80),
    Family("Inception-ResNet v2", "inception_resnet_v2", {}, 80),
    Family("Xception", "legacy_xception"),
    Family("NASNet", "nasnetalarge", {"stem_size": 32, "num_features": 1056}),
    Family("DenseNet", "densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    Family("DPN", "dpn48b"),
    Family("DLA", "dla46_c"),
    Family("HRNet", "hrnet_w18_small"),
    Family("CSPDarkNet", "cs3darknet_s"),
    Family("CSPNeXt", "cspnext_tiny"),
    Family("VoVNet", "ese_vovnet19b_slim_dw"),
    Family("SelecSLS", "selecsls42"),
    Family("HGNet", "hgnetv2_b0"),
    Family("RepVGG", "repvgg_a0"),
    Family("MobileOne", "mobileone_s0"),
    Family("TResNet", "tresnet_m", {"layers": (1,) * 4, "width_factor": 0.25}),
    Family("HaloNet", "byobnet.ByobNet", {"cfg": HALO}),
    Family("LambdaResNet", "lambda_resnet26t"),
    Family("BoTNet", "botnet26t_256", {"img_size": 64}),
]  # fmt: skip


def build(family: Family) -> nn.Module:
    """The model in eval mode, with random weights through which every branch matters."""
    torch.manual_seed(0)
    if "." in family.model:
        module, _, name = family.model.partition(".")
        model = getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=CLASSES, **family.args)
    else:
        model = timm.create_model(family.model, num_classes=CLASSES, **family.args)
    model.eval().requires_grad_(False)
    waken(model, torch.randn(8, 3, family.size, family.size))
    return model


def waken(model: nn.Module, images: Tensor) -> None:
    """Random values where fresh weights are zero, constant or too small for their branch to matter, and batch norms
    with the statistics of `images`."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            if float(module.weight.std()) * fan_in**0.5 < 0.8:
                module.weight.normal_(0, fan_in**-0.5)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and float(parameter.std()) > 1e-3:
            continue
        if float(parameter.abs().mean()) > 0.3:  # a gain of one
            parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            parameter.uniform_(0.3, 0.8)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.track_running_stats]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
        norm.training = True
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, False
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()))  # a dead channel would amplify rounding
