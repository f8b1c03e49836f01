"""The commands of megamtp except pretraining, which is megamtp/pretrain.py."""
