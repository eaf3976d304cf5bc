// A chat with a deltawire gateway, from Node.
//
//     npm ci
//     node chat.js "Describe Norway"
//     node chat.js --target gateway.example:50051 --model my-model --tool tools.json "How warm is it in Oslo?"
//
// No code was generated for it: grpc-js reads the proto files when it starts, so this file and the protos are all that a
// client in JavaScript needs. To use it elsewhere, take both along and name the folder with --protos.
//
// Exit status: 0 the answer is whole, 1 the call failed, 2 the command line is wrong, 130 Ctrl-C.

'use strict';

const fs = require('node:fs');
const path = require('node:path');
const { parseArgs } = require('node:util');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const USAGE = `usage: node chat.js [options] PROMPT

  --target HOST:PORT   the gateway (default 127.0.0.1:50051)
  --model NAME         default: the only model there is
  --tool FILE          tools in OpenAI's form, as JSON: one, or a list; repeatable
  --json               print the events as JSON, one a line, instead of the text
  --protos FOLDER      where deltawire/v1/*.proto are`;

// gRPC sends the call again when it fails with UNAVAILABLE, as long as nothing of the answer has come. No text is ever
// seen twice; the engine may have begun all the same.
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: 'deltawire.v1.ChatCompletion' }, { service: 'deltawire.v1.ModelRegistry' }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: '0.2s',
        maxBackoff: '2s',
        backoffMultiplier: 2,
        retryableStatusCodes: ['UNAVAILABLE'],
      },
    },
  ],
};

// Read the protos and make a client for each service.
function connect(target, protos) {
  const definition = protoLoader.loadSync(
    ['deltawire/v1/chat_completion.proto', 'deltawire/v1/model_registry.proto'],
    {
      includeDirs: [protos],
      enums: String, // STOP_REASON_END_OF_TURN rather than 1
      longs: String, // 64-bit numbers do not fit into a JavaScript number
      bytes: String, // as base64
    },
  );
  const { ChatCompletion, ModelRegistry } = grpc.loadPackageDefinition(definition).deltawire.v1;
  const options = {
    'grpc.service_config': JSON.stringify(SERVICE_CONFIG),
    // A stream may be silent for minutes while a long prompt is read: pings detect a lost connection.
    'grpc.keepalive_time_ms': 30_000,
  };
  // For a gateway with TLS: grpc.credentials.createSsl().
  const credentials = grpc.credentials.createInsecure();
  return {
    chat: new ChatCompletion(target, credentials, options),
    registry: new ModelRegistry(target, credentials, options),
  };
}

// The id of the only model there is.
async function onlyModel(registry) {
  const response = await new Promise((resolve, reject) => {
    registry.listModels({}, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
  // Fields at their default are left out, so an empty list is no list.
  const ids = (response.models ?? []).map((model) => model.id);
  if (ids.length !== 1) {
    throw new Error(`name one with --model: ${ids.join(', ') || 'the gateway has no model yet'}`);
  }
  return ids[0];
}

// OpenAI's tool objects as ours. Schemas travel as JSON text, so nothing of them is lost.
function readTools(file) {
  const given = JSON.parse(fs.readFileSync(file, 'utf8'));
  return [given].flat().map((tool) => ({
    name: tool.function.name,
    description: tool.function.description,
    inputSchema: JSON.stringify(tool.function.parameters ?? {}),
    ...(tool.function.strict === undefined ? {} : { strict: tool.function.strict }),
  }));
}

// Read the events of a stream to its end and give the last one, `Completed`.
async function readStream(call, show) {
  let completed;
  // An error status is thrown here, after the events that came before it.
  for await (const event of call) {
    show(event);
    completed = event.completed ?? completed;
  }
  // A proxy can turn a broken stream into one that just stops, or lose the status that came after the first event.
  if (!completed) {
    throw new Error('the stream ended without Completed: this is not the whole answer');
  }
  if (completed.error) {
    throw new Error(`${completed.error.reason}: ${completed.error.message}`);
  }
  return completed;
}

// Print an event for people: text as it comes, a line for each tool call.
function print(event) {
  if (event.textDelta) {
    process.stdout.write(event.textDelta.text ?? '');
  } else if (event.toolCallDelta) {
    const { toolCall, failure } = event.toolCallDelta;
    if (toolCall) {
      console.log(`\ntool call ${toolCall.toolName}(${toolCall.arguments}) ${toolCall.callId}`);
    } else if (failure) {
      // Never run such a call. What the model wrote is in failure.rawArguments.
      console.log(`\ntool call ${event.toolCallDelta.toolName ?? ''} failed: ${failure.reason}: ${failure.message}`);
    }
  } else if (event.choiceFinished) {
    // A half-finished batch of calls is not to be executed either: tool_calls_executable is about all of them.
    const executable = event.choiceFinished.toolCallsExecutable ? ', tool calls may be executed' : '';
    console.log(`\n[${event.choiceFinished.stopReason}${executable}]`);
  }
  // `started`, `reasoningDelta`, and events of versions to come need nothing here.
}

// A failure in one line. gRPC's own status says what to do; the trailer `deltawire-reason` says what happened.
function describe(error) {
  if (!error.metadata) {
    return error.message;
  }
  const [reason = 'no reason given'] = error.metadata.get('deltawire-reason');
  return `${grpc.status[error.code]} (${reason}): ${error.details}`;
}

async function main() {
  let values;
  let prompt;
  let tools;
  try {
    const parsed = parseArgs({
      allowPositionals: true,
      options: {
        target: { type: 'string', default: '127.0.0.1:50051' },
        model: { type: 'string' },
        tool: { type: 'string', multiple: true, default: [] },
        json: { type: 'boolean', default: false },
        protos: { type: 'string', default: path.join(__dirname, '..', '..', '..', 'protos') },
      },
    });
    values = parsed.values;
    prompt = parsed.positionals.join(' ');
    tools = values.tool.flatMap(readTools);
    if (!prompt) {
      throw new Error('PROMPT is missing');
    }
  } catch (error) {
    console.error(`${error.message}\n${USAGE}`);
    return 2;
  }

  const { chat, registry } = connect(values.target, values.protos);
  let interrupted = false;
  try {
    const model = values.model ?? (await onlyModel(registry));
    const messages = [{ user: { text: prompt } }];
    const call = chat.streamChatCompletion({ chat: { model, messages, tools } });
    // Cancelling reaches the engine: it stops generating. Leaving the loop over the events would not do that.
    process.once('SIGINT', () => {
      interrupted = true;
      call.cancel();
    });
    await readStream(call, values.json ? (event) => console.log(JSON.stringify(event)) : print);
    return 0;
  } catch (error) {
    if (interrupted) {
      return 130;
    }
    console.error(describe(error));
    return 1;
  } finally {
    chat.close();
    registry.close();
  }
}

main().then((status) => {
  process.exitCode = status;
});
