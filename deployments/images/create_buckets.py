"""Create the buckets named as arguments where they are missing; AWS_ENDPOINT_URL_S3 names the store."""

import sys

import boto3
from botocore.exceptions import ClientError


def main(names: list[str]) -> None:
    """Create each bucket; one that exists is left as it is. Raises ClientError for one that is somebody else's."""
    client = boto3.client("s3")
    for name in names:
        try:
            client.head_bucket(Bucket=name)
            print(f"bucket {name} exists")
        except ClientError as error:
            if error.response["Error"]["Code"] != "404":
                raise
            client.create_bucket(Bucket=name)
            print(f"created bucket {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
