"""Small reference networks, and lazy doors to the large collections (timm, torchvision, transformers)."""
