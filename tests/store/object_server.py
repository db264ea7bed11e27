"""An S3-compatible server on this machine, in a process of its own: moto's, which checks signatures."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import boto3

POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
SERVE = """
import sys, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(1e9)
"""
NUM_FREE = 4  # the requests below, after which the server lets in only whom it knows


class Server(NamedTuple):
    """A server that runs, with a bucket named "bucket" and one user.

    Args:
        process: that serves.
        environment: variables by which an S3 client finds it, and may use it.
    """

    process: subprocess.Popen
    environment: dict[str, str]

    @property
    def options(self) -> dict:
        """The same as options of an `ObjectStore`."""
        return {name.removeprefix("AWS_").lower(): value for name, value in self.environment.items()}

    @property
    def port(self) -> int:
        return int(self.environment["AWS_ENDPOINT_URL"].rpartition(":")[2])


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    """Run a server for a while; port 0 is one that is free."""
    command = [sys.executable, "-W", "ignore", "-c", SERVE, str(port)]
    environment = os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": str(NUM_FREE)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield Server(process, _make_user_and_bucket(f"http://127.0.0.1:{int(process.stdout.readline())}"))
    finally:
        process.kill()
        process.communicate()


def _make_user_and_bucket(url: str) -> dict[str, str]:
    anybody = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    iam = boto3.client("iam", endpoint_url=url, **anybody)
    iam.create_user(UserName="user")
    iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument=json.dumps(POLICY))
    key = iam.create_access_key(UserName="user")["AccessKey"]
    boto3.client("s3", endpoint_url=url, **anybody).create_bucket(Bucket="bucket")
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": anybody["region_name"],
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }
