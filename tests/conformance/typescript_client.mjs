// The TypeScript SDK's client as a process: tests/support/typescript_client.py starts it, and says what it means.
//
// Arguments: the URLs of requests, of calls and what resumes them, and of the standalone stream. Commands come in on
// stdin and events go out on stdout, each as a line of JSON.

import { createInterface } from 'node:readline';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ElicitRequestSchema, LoggingMessageNotificationSchema, ResultSchema } from '@modelcontextprotocol/sdk/types.js';

const [direct, calls, listening] = process.argv.slice(-3);
const tell = (event) => process.stdout.write(JSON.stringify(event) + '\n');
const cursorsOfCalls = new Set();

// Tells of every request, and sends those that a test may cut off through a proxy of their own.
async function tellingFetch(url, init) {
  const { method } = init;
  const lastEventId = new Headers(init.headers).get('last-event-id');
  const message = init.body ? JSON.parse(init.body) : {};
  let target = direct;
  if (method === 'GET') target = cursorsOfCalls.has(lastEventId) ? calls : listening;
  if (message.method === 'tools/call') target = calls;
  const response = await fetch(target, init);
  tell({
    event: 'response',
    of: method === 'POST' ? (message.method ?? 'answer') : method,
    call: cursorsOfCalls.has(lastEventId),
    cursor: lastEventId,
    status: response.status,
    worker: response.headers.get('x-worker')
  });
  return response;
}

const client = new Client({ name: 'typescript', version: '1.0.0' }, { capabilities: { elicitation: {} } });
client.setRequestHandler(ElicitRequestSchema, async (request) => {
  tell({ event: 'elicitation', message: request.params.message });
  return { action: 'accept', content: { answer: `answer to ${request.params.message}` } };
});
client.setNotificationHandler(LoggingMessageNotificationSchema, (notification) => {
  tell({ event: 'log', ...notification.params });
});
client.onerror = (error) => tell({ event: 'trouble', message: String(error) });

const transport = new StreamableHTTPClientTransport(new URL(direct), {
  fetch: tellingFetch,
  reconnectionOptions: {
    initialReconnectionDelay: 50,
    maxReconnectionDelay: 50,
    reconnectionDelayGrowFactor: 1,
    maxRetries: 2
  }
});
await client.connect(transport);
tell({ event: 'connected', protocol: transport.protocolVersion });

const running = new Map();

function request({ key, method, params }) {
  const abort = new AbortController();
  running.set(key, abort);
  client
    .request({ method, params }, ResultSchema, {
      signal: abort.signal,
      timeout: 120_000,
      onprogress: (progress) => tell({ event: 'progress', key, ...progress }),
      onresumptiontoken: (cursor) => {
        cursorsOfCalls.add(cursor);
        tell({ event: 'cursor', key, cursor });
      }
    })
    .then(
      (result) => tell({ event: 'result', key, result }),
      (error) => tell({ event: 'error', key, code: error.code, message: error.message, data: error.data })
    );
}

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  if (command.do === 'request') request(command);
  if (command.do === 'cancel') running.get(command.key).abort('The test cancels it.');
}
await client.close();
