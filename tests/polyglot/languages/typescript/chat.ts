// Streams one answer from the gateway at the given address and prints its text and tool calls, with ts-proto and grpc-js.

import { credentials, type ServiceError } from '@grpc/grpc-js';

import {
  ChatCompletionClient,
  type Completed,
  StreamChatCompletionRequest,
  type StreamChatCompletionResponse,
} from './gen/ts-proto/deltawire/v1/chat_completion';

const request = StreamChatCompletionRequest.fromPartial({
  start: {
    $case: 'chat',
    value: {
      messages: [{ role: { $case: 'user', value: { text: 'How warm is it in Oslo?' } } }],
      tools: [{ name: 'get_weather', inputSchema: '{"type":"object","properties":{"city":{"type":"string"}}}' }],
    },
  },
});

function chat(target: string): Promise<Completed | undefined> {
  const client = new ChatCompletionClient(target, credentials.createInsecure());
  const call = client.streamChatCompletion(request, { deadline: Date.now() + 60_000 });
  let completed: Completed | undefined;
  return new Promise<Completed | undefined>((resolve, reject) => {
    call.on('data', ({ event }: StreamChatCompletionResponse) => {
      switch (event?.$case) {
        case 'textDelta':
          process.stdout.write(event.value.text);
          break;
        case 'toolCallDelta': {
          const { outcome } = event.value;
          if (outcome?.$case === 'toolCall') {
            process.stdout.write(`\ntool call ${outcome.value.toolName}(${outcome.value.arguments})`);
          }
          break;
        }
        case 'completed':
          completed = event.value;
          break;
      }
    });
    call.on('error', (error: ServiceError) => reject(error));
    call.on('end', () => resolve(completed));
  }).finally(() => client.close());
}

chat(process.argv[2]).then(
  (completed) => {
    if (!completed || completed.error) {
      console.error('not the whole answer');
      process.exitCode = 1;
    } else {
      console.log('\ncompleted');
    }
  },
  (error: ServiceError) => {
    console.error(error.message);
    process.exitCode = 1;
  },
);
