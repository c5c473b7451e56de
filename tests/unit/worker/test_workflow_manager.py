"""The maximum size of a workflow request."""

from dataclasses import replace

from records_made import record

from api.settings import MAX_PARTS
from shared.instances import StoredInstance
from worker.routing import resolve
from worker.workflow_manager import WorkflowManager

# RabbitMQ 4's default of `max_message_size`.
LARGEST_MESSAGE_BYTES = 16 << 20

# Maximum body of a request that creates a VAE.
LARGEST_VAE_BYTES = 1 << 20


def test_a_request_of_the_maximum_parts_fits_into_rabbitmqs_default_maximum() -> None:
    longest = "1." + "9" * 62
    instance = StoredInstance(longest, longest, longest, longest, 1, "")
    workflow = "w" * 128
    workflows = (workflow,) * (LARGEST_VAE_BYTES // len(f'"{workflow}",'))
    largest = replace(
        record(),
        file_count=MAX_PARTS,
        instances=None,
        source="v6-0123456789ab",
        destination="D" * 15,
        vae_workflows=workflows,
    )
    manager = WorkflowManager("monaideploy", "md.workflow.request", "b" * 63)

    request = manager.request(largest, resolve(largest))
    message = manager.message(largest, request, [instance] * MAX_PARTS)

    assert LARGEST_MESSAGE_BYTES * 0.99 < len(message.body) <= LARGEST_MESSAGE_BYTES
