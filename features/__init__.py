"""From images to numbers on disk: OCR lines and region features."""
