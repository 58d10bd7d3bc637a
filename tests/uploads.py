"""Uploads that were begun and never finished."""

from __future__ import annotations

import os
from pathlib import Path


def begin_upload(root: str, path: str) -> None:
    """What a process leaves behind that is killed while it uploads."""
    if not root.startswith("s3://"):
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / ".tmp-killed").write_bytes(bytes(5 << 20))
        return
    import boto3

    keys = {f"aws_{n}": os.environ[f"AWS_{n.upper()}"] for n in ("access_key_id", "secret_access_key")}
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    key = f"{prefix}/{path}"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))
