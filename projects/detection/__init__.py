"""Transfer to detection (after the paper's Table 11): a distilled classifier as the backbone of Mask R-CNN, on data in COCO's format."""
