"""``upload_file.py ENDPOINT BUCKET KEY FILE``: what people write who have boto3; keys come from the environment."""

from __future__ import annotations

import sys

import boto3


def main(endpoint: str, bucket: str, key: str, path: str) -> None:
    """With boto3's own settings: parts of 8 MiB, ten at a time."""
    boto3.client("s3", endpoint_url=endpoint).upload_file(path, bucket, key)


if __name__ == "__main__":
    main(*sys.argv[1:])
