"""Networks of the packages timm, pytorchcv and monai: images at full width, medical images at reduced width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from foreign_places import foreign, from_packages
from torch import nn

from tests.zoo.architecture import Architecture, Example, floats, mixed

SIDE = 96

# The smallest network of each family; behind the colon the side of the image, where it is not 96.
TIMM = """
    resnet10t resnetv2_50 seresnet33ts skresnet18 ecaresnet26t resnest14d res2net50_26w_4s gcresnet33ts
    botnet26t_256:256 halonet26t:256 lambda_resnet26t:256 bat_resnext26ts:256 regnetz_005 regnetx_002 regnety_002
    nf_regnet_b0 dm_nfnet_f0 convnext_atto convnextv2_atto convnext_zepto_rms mobilenetv1_100 mobilenetv2_035
    mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium efficientnet_b0 efficientnetv2_rw_t tinynet_e
    fbnetc_100 mixnet_s mnasnet_small ghostnet_050 ghostnetv2_100 ghostnetv3_100 hardcorenas_a lcnet_035 rexnet_100
    densenet121 densenetblur121d dla46_c dpn48b hrnet_w18_small inception_v3:160 inception_resnet_v2:160
    inception_next_atto xception41 legacy_seresnet18 cspresnet50 cspdarknet53 darknetaa53 cs3darknet_s selecsls42
    ese_vovnet19b_dw hgnetv2_b0 repvgg_a0 mobileone_s0 repghostnet_050 repvit_m0_9 fastvit_t8 fasternet_t0 starnet_s1
    tresnet_m vgg11_bn pnasnet5large nasnetalarge convmixer_768_32 poolformerv2_s12 caformer_s18 identityformer_s12
    vit_tiny_patch16_224:224 vit_tiny_r_s16_p8_224:224 vit_relpos_small_patch16_224:224
    vit_srelpos_small_patch16_224:224 vit_small_patch16_rope_224:224 deit_tiny_distilled_patch16_224:224
    deit3_small_patch16_224:224 beit_base_patch16_224:224 eva02_tiny_patch14_224:224 cait_xxs24_224:224
    crossvit_tiny_240:240 coat_tiny:224 coatnet_nano_rw_224:224 maxvit_pico_rw_256:256 convit_tiny:224
    swin_tiny_patch4_window7_224:224 swinv2_tiny_window8_256:256 swinv2_cr_tiny_ns_224:224 davit_tiny:224
    nest_tiny:224 pit_ti_224:224 pvt_v2_b0:224 tnt_s_patch16_224:224 twins_pcpvt_small:224 twins_svt_small:224
    visformer_tiny:224 volo_d1_224:224 xcit_nano_12_p16_224:224 edgenext_xx_small efficientformer_l1:224
    efficientformerv2_s0:224 efficientvit_b0 efficientvit_m0:224 levit_128s:224 levit_conv_128s:224 mobilevit_xxs
    mobilevitv2_050 focalnet_tiny_srf gcvit_xxtiny:224 hiera_tiny_224:224 hieradet_small:256 mambaout_femto
    mixer_s32_224:224 resmlp_12_224:224 gmixer_12_224:224 gmlp_ti16_224:224 mvitv2_tiny:224 nextvit_small rdnet_tiny
    sequencer2d_s:224 shvit_s1 swiftformer_xs:224 tiny_vit_5m_224:224 vitamin_small_224:224
"""
# The same; networks that are told the size of the image are marked by "+". The last pool of most takes 7x7 positions.
PYTORCHCV = """
    airnet50_1x64d_r16+ airnext50_32x4d_r2+ bagnet9+ bam_resnet18+ bninception+ cbam_resnet18+
    centernet_resnet18_voc+:128 cgnet_cityscapes+:128 channelnet+ condensenet74_c4_g4+ ctxnet_cityscapes+:128
    dabnet_cityscapes+:128 danet_resnetd50b_cityscapes+:96 darknet_tiny+ darts+ deeplabv3_resnetd50b_voc+:96
    densenet40_k12_cifar10:32 diapreresnet10+ diaresnet10+ dicenet_wd5+:224 diracnet18v2+ dla46xc+ dpn68+ drnc26+
    edanet_cityscapes+:128 efficientnet_edge_small_b+ enet_cityscapes+:128 erfnet_cityscapes+:128
    esnet_cityscapes+:128 espcnet_cityscapes+:128 espnetv2_wd2+ fastscnn_cityscapes+:128 fbnet_cb+ fdmobilenet_wd4+
    fishnet99+ fpenet_cityscapes+:128 fractalnet_cifar10:32 ghostnet+ hardnet39ds+ ibn_resnet50+ ibnb_resnet50+
    icnet_resnetd50b_cityscapes+:128 igcv3_wd4+ inceptionresnetv1+:160 inceptionv4+:160 irevnet301+
    isqrtcovresnet18+ lednet_cityscapes+:128 lffd20x5s320v2_widerface:128 linknet_cityscapes+:128 menet108_8x1_g3+
    mixnet_s+ msdnet22_cifar10:32 nasnet_4a1056+ octresnet10_ad2+ peleenet+ pfpcnet:224 preresnet10+ prnet:64
    proxylessnas_mobile+ pspnet_resnetd50b_voc+:96 pyramidnet110_a48_cifar10:32 resattnet56+:224
    resdropresnet20_cifar10:32 resnesta18+ resneta10+ resnetd50b+ resnext14_16x4d+ revnet38+ rir_cifar10:32
    ror3_56_cifar10:32 scnet50+ segnet_cityscapes+:64 selecsls42+ senet16+ sepreresnet10+ shakedropresnet20_cifar10:32
    shakeshakeresnet20_2x16d_cifar10:32 sharesnet18+ shufflenet_g3_wd4+ shufflenetv2b_wd2+ sinet_cityscapes+:128
    sknet50+ sparsenet121+ spnasnet+ sqnet_cityscapes+:128 sqnxt23_w1+ squeezeresnet_v1_1+ tresnet_m+
    unet_cityscapes+:64 vovnet27s+ wrn20_10_1bit_cifar10:32 xdensenet121_2+ zfnet+:224 alexnet+:224
    bisenet_resnet18_celebamaskhq:128 ibppose_coco:128 simplepose_mobile_mobilenetv2b_w1_coco:128
    lwopenpose2d_mobilenet_cmupan_coco:96
"""


def timm_networks() -> dict[str, Architecture]:
    """Timm's, by name: "timm/" and timm's own."""

    def make(name: str) -> nn.Module:
        made: nn.Module = from_packages("timm", absent="torchvision").create_model(name, num_classes=10)
        return made

    return {
        f"timm/{name}": foreign(name, "timm", partial(make, name), floats((3, side, side)))
        for name, side in _listed(TIMM)
    }


def pytorchcv_networks() -> dict[str, Architecture]:
    """Pytorchcv's, by name."""

    def make(name: str, options: dict[str, Any]) -> nn.Module:
        made: nn.Module = from_packages("pytorchcv.model_provider", absent="torchvision").get_model(
            name, **options
        )
        return made

    found = {}
    for marked, side in _listed(PYTORCHCV, usual_side=224):
        name = marked.removesuffix("+")
        options = {"in_size": (side, side)} if marked != name else {}
        made = foreign(name, "pytorchcv", partial(make, name, options), floats((3, side, side)))
        found[f"pytorchcv/{name}"] = made
    return found


def _listed(text: str, usual_side: int = SIDE) -> Iterator[tuple[str, int]]:
    for entry in text.split():
        name, _, side = entry.partition(":")
        yield name, int(side or usual_side)


def monai_networks() -> dict[str, Architecture]:
    """Monai's, by name."""

    def make(build: Callable[[Any], nn.Module]) -> nn.Module:
        return build(from_packages("monai.networks.nets"))

    return {
        f"monai/{name}": foreign(name, "monai", partial(make, build), example)
        for name, build, example in _monai()
    }


def _monai() -> Iterator[tuple[str, Callable[[Any], nn.Module], Example]]:
    image, volume = floats((1, 32, 32)), floats((1, 16, 16, 16))
    steps: Example = lambda batch=2: (torch.arange(batch) + 3,)  # noqa: E731
    widths = (8, 8, 16, 32, 64, 8)
    yield "UNet", lambda nets: nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), image
    yield (
        "UNet3d",
        lambda nets: nets.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1, norm="batch"),
        volume,
    )
    yield "BasicUNet", lambda nets: nets.BasicUNet(2, 1, 2, widths), image
    yield "BasicUNetPlusPlus", lambda nets: nets.BasicUNetPlusPlus(2, 1, 2, widths), image
    yield "AttentionUnet", lambda nets: nets.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), image
    yield (
        "DynUNet",
        lambda nets: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32], res_block=True),
        image,
    )
    blocks = {"blocks_down": (1, 2, 2), "blocks_up": (1, 1)}
    yield "SegResNet", lambda nets: nets.SegResNet(2, 8, 1, 2, **blocks), image
    yield "SegResNetDS", lambda nets: nets.SegResNetDS(2, 8, 1, 2, blocks_down=(1, 2, 2)), image
    yield "VNet", lambda nets: nets.VNet(2, 1, 2), image
    yield "HighResNet", lambda nets: nets.HighResNet(2, 1, 2), floats((1, 24, 24))
    attention = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4, "spatial_dims": 2}
    yield "UNETR", lambda nets: nets.UNETR(1, 2, (32, 32), feature_size=8, **attention), image
    yield (
        "SwinUNETR",
        lambda nets: nets.SwinUNETR(
            1, 2, patch_size=2, depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4), window_size=4, feature_size=12,
            spatial_dims=2,
        ),
        floats((1, 64, 64)),
    )  # fmt: skip
    yield (
        "FlexibleUNet",
        lambda nets: nets.FlexibleUNet(3, 2, "efficientnet-b0", spatial_dims=2),
        floats((3, 64, 64)),
    )
    yield "DenseNet121", lambda nets: nets.DenseNet121(2, 1, 3), floats((1, 64, 64))
    yield (
        "EfficientNetBN",
        lambda nets: nets.EfficientNetBN("efficientnet-b0", False, spatial_dims=2, in_channels=1),
        floats((1, 64, 64)),
    )
    yield "SEResNet50", lambda nets: nets.SEResNet50(spatial_dims=2, in_channels=1), floats((1, 64, 64))
    yield (
        "resnet10",
        lambda nets: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=3),
        floats((1, 32, 32, 32)),
    )
    yield "Regressor", lambda nets: nets.Regressor((1, 32, 32), 3, (8, 16), (2, 2)), image
    yield (
        "AutoEncoder",
        lambda nets: nets.AutoEncoder(
            2, 1, 1, (8, 16), (2, 2), inter_channels=(16, 16), inter_dilations=(1, 2)
        ),
        image,
    )
    yield (
        "ViT",
        lambda nets: nets.ViT(1, (32, 32), (8, 8), num_layers=2, classification=True, **attention),
        image,
    )
    yield (
        "MedNeXt",
        lambda nets: nets.MedNeXt(
            2, 8, 1, 2, blocks_down=(1, 1, 1, 1), blocks_bottleneck=1, blocks_up=(1, 1, 1, 1)
        ),
        image,
    )
    levels = {"attention_levels": (False, True), "norm_num_groups": 4, "channels": (8, 16)}
    yield (
        "DiffusionModelUNet",
        lambda nets: nets.DiffusionModelUNet(2, 1, 1, num_res_blocks=1, num_head_channels=8, **levels),
        mixed(floats((1, 16, 16)), steps),
    )
    yield (
        "AutoencoderKL.decoder",
        lambda nets: nets.AutoencoderKL(2, 1, 1, num_res_blocks=(1, 1), latent_channels=4, **levels).decoder,
        floats((4, 16, 16)),
    )
    yield "PatchDiscriminator", lambda nets: nets.PatchDiscriminator(2, 8, 1), image
    yield "RegUNet", lambda nets: nets.RegUNet(2, 1, 8, 2), image
