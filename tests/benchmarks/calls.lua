-- What wrk sends: calls of `echo`, dealt to the sessions in turn, each with an id of its own.
-- Arguments: path, protocol version, the name of the tool's argument, session ids.

local path, argument, number, sessions = nil, nil, 0, {}
local headers = {
  ["Accept"] = "application/json, text/event-stream",
  ["Content-Type"] = "application/json",
}

function init(arguments)
  path = arguments[1]
  headers["MCP-Protocol-Version"] = arguments[2]
  argument = arguments[3]
  for place = 4, #arguments do
    sessions[place - 3] = arguments[place]
  end
end

function request()
  number = number + 1
  headers["Mcp-Session-Id"] = sessions[number % #sessions + 1]
  local body = string.format(
    '{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"echo","arguments":{"%s":"hello"}}}',
    number + 100, argument)
  return wrk.format("POST", path, headers, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"calls":%d,"microseconds":%d,"p50":%d,"p99":%d,"errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
