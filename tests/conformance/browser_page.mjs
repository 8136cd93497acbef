// A page that uses the TypeScript SDK's client, as esbuild bundles it: tests/support/browser.py serves it, and says what
// it means. `?endpoint=` is the MCP endpoint, on another origin; everything that happens is told to the page's own server.

import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';

const endpoint = new URLSearchParams(location.search).get('endpoint');
const tell = (event) => fetch('/told', { method: 'POST', body: JSON.stringify(event) });

const received = [];
const cursors = [];
try {
  const transport = new StreamableHTTPClientTransport(new URL(endpoint), {
    requestInit: { headers: { Authorization: 'Bearer of-the-page' } },
    reconnectionOptions: {
      initialReconnectionDelay: 50,
      maxReconnectionDelay: 200,
      reconnectionDelayGrowFactor: 1.5,
      maxRetries: 20
    }
  });
  const client = new Client({ name: 'page', version: '1.0.0' });
  await client.connect(transport);
  const result = await client.callTool({ name: 'count', arguments: { n: 40, seconds: 3 } }, undefined, {
    timeout: 30_000,
    onresumptiontoken: (cursor) => cursors.push(cursor),
    onprogress: (progress) => {
      received.push(Number(progress.message));
      if (received.length === 10) tell({ event: 'half way' });
    }
  });
  await tell({
    event: 'done',
    session: transport.sessionId ?? null,
    received,
    cursors,
    text: result.content[0].text
  });
} catch (error) {
  await tell({ event: 'failed', message: String(error), received });
}
