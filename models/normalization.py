"""Means and deviations of pixels between 0 and 1, a channel each, that published image towers were trained with."""

# OpenAI's CLIP, and with it IDEFICS and most towers since.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# ImageNet, as torchvision's models and GroupViT's own code have it.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
