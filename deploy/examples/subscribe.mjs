// Tells which datasets are bad and which are good again, missing none while it is away.
//
//   npm ci && NATS_URL=nats://127.0.0.1:4222 node subscribe.mjs [SELECTOR]
//
// SELECTOR is one of the project's named selectors: only what it selects is told. The consumer is
// durable: NATS remembers what this program has dealt with. Run by tests on Node 24; needs 22.

import { connect } from '@nats-io/transport-node';
import { AckPolicy, DeliverPolicy, jetstream, jetstreamManager } from '@nats-io/jetstream';

const selector = process.argv[2];
const BAD = ['error', 'fail', 'partial_success', 'lost', 'runtime error'];
const GOOD = ['success', 'pass', 'warn'];

function tell(event) {
  const status = event.check?.status ?? event.status;
  const word = BAD.includes(status) ? 'failed'
    : GOOD.includes(status) && BAD.includes(event.previous_status) ? 'recovered' : null;
  if (word === null) return;
  const what = event.check ? `${event.key}, ${event.check.name}` : event.key;
  const why = (event.check?.message ?? event.message ?? status).replace(/\s+/g, ' ');
  console.log(`${word} ${event.project}.${event.target} ${what}: ${why} [${event.owners.join(', ')}]`);
}

const servers = process.env.NATS_URL ?? 'nats://127.0.0.1:4222';
const connection = await connect({ servers, maxReconnectAttempts: -1, name: 'asset-watch' });
const durable = `asset-watch-${selector ?? 'all'}`;
await (await jetstreamManager(connection)).consumers.add('DBT_EVENTS', {
  durable_name: durable,
  filter_subject: 'dbt.events.*.*.asset.>',
  deliver_policy: DeliverPolicy.New, // of a first start; then from where it left off
  ack_policy: AckPolicy.Explicit,
});
const consumer = await jetstream(connection).consumers.get('DBT_EVENTS', durable);
const messages = await consumer.consume();
console.error(`watching as ${durable}`);
for await (const message of messages) {
  const matches = message.headers?.get('dbtstream-matches').split(',') ?? [];
  if (selector === undefined || matches.includes(selector)) tell(message.json());
  message.ack(); // only now: what was not told is delivered again
}
