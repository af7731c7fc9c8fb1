"""Create the buckets named as arguments where they are missing; AWS_ENDPOINT_URL_S3 names the store."""

import sys

import boto3
from botocore.exceptions import ClientError


def main(names: list[str]) -> None:
    """Create each bucket; one that this account owns already is left as it is."""
    client = boto3.client("s3")
    for name in names:
        try:
            client.create_bucket(Bucket=name)
            print(f"created bucket {name}")
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
            client.head_bucket(Bucket=name)  # BucketAlreadyExists may also be somebody else's
            print(f"bucket {name} exists")


if __name__ == "__main__":
    main(sys.argv[1:])
