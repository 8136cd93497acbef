-- What wrk sends: calls of `echo`, dealt to the sessions in turn, each with an id of its own.
-- Arguments: path, protocol version, session ids.

local path, number, sessions = nil, 0, {}
local headers = {
  ["Accept"] = "application/json, text/event-stream",
  ["Content-Type"] = "application/json",
}

function init(arguments)
  path = arguments[1]
  headers["MCP-Protocol-Version"] = arguments[2]
  for place = 3, #arguments do
    sessions[place - 2] = arguments[place]
  end
end

function request()
  number = number + 1
  headers["Mcp-Session-Id"] = sessions[number % #sessions + 1]
  local body = string.format(
    '{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"}}}', number + 100)
  return wrk.format("POST", path, headers, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"calls":%d,"microseconds":%d,"p50":%d,"p99":%d,"errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
